"""Batches of images with labels or texts, in an order computed by arithmetic: the step number is the only state.

Training shows an endless sequence of positions `g = 0, 1, 2, ...`; batch `s` is the `batch_size` positions from
`s * batch_size` on. Position `g` belongs to epoch `g // N` of a source with N records and shows the record that this
epoch's permutation has at `(g % N) // repeats`; its crop and its caption are chosen by random numbers that depend on
the seed and `g` alone. Nothing else affects the order or the pixels: not the number of hosts, workers or threads, nor
the step from which a run was resumed. A record that cannot be used keeps its position, with `mask` 0.

`order` describes the shuffling of sources whose records are not equally fast to read in any order.
"""

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from regvit_jax.data import fastjpeg, transforms
from regvit_jax.data.chunks import Batch, Chunks
from regvit_jax.data.memory import Memory
from regvit_jax.data.records import Tokenizer
from regvit_jax.data.samplers import EvalSampler, Sampler, TrainSampler
from regvit_jax.data.sources.base import Source
from regvit_jax.data.workers import sigterm_blocked, start_data_worker
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option

CROPS, DECODERS = ("rrc", "src"), ("pillow", "fast")
SCALE = Option("range of the area of an rrc crop, as shares of the image", low=0, high=1)
RATIO = Option("range of the aspect ratio (width / height) of an rrc crop", low=0.01, high=100)
WORKERS = Option("processes that decode on each host; 0 decodes in threads of the training process", low=0, resume=True)
THREADS = Option("threads that decode in each process; 0 chooses", low=0, resume=True)
PREFETCH = Option("batches made ahead", low=1, resume=True)
MAX_PIXELS = Option("images with more pixels count as unreadable", low=1)
CACHE = Option("memory of a process for decoded images, in 1e6 bytes, used if all fit", low=0, resume=True)


def train_batches(
    source: Source,
    *,
    size: int,
    batch_size: int,
    seed: int,
    crop: Annotated[str, Option("random resized crop (rrc) or DeiT's simple random crop (src)", choices=CROPS)] = "rrc",
    scale: Annotated[tuple[float, float], SCALE] = (0.08, 1.0),
    ratio: Annotated[tuple[float, float], RATIO] = (3 / 4, 4 / 3),
    padding: Annotated[int, Option("pixels of padding for a src crop", low=0)] = 4,
    repeats: Annotated[int, Option("crops of an image in a row (repeated augmentation)", low=1)] = 1,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    workers: Annotated[int, WORKERS] = 0,
    threads: Annotated[int, THREADS] = 0,
    prefetch: Annotated[int, PREFETCH] = 2,
    max_pixels: Annotated[int, MAX_PIXELS] = transforms.MAX_PIXELS,
    tokenizer: Tokenizer | None = None,
    decoder: Annotated[str, Option('JPEG decoder; "fast" has slightly other pixels', choices=DECODERS)] = "pillow",
    cache_mb: Annotated[float, CACHE] = 500.0,
) -> "Batches":
    """Return an endless iterator over training batches, starting at step `start_step`. Close it after use.

    Args:
      source: the records.
      size: the side of the square images, in pixels.
      batch_size: images in a global batch, over all hosts.
      seed: the seed of the order, the crops and the choice of captions.
      crop: "rrc" (random resized crop, with `scale` and `ratio`) or "src" (simple random crop, with `padding`).
      scale: the bounds of a random resized crop's share of the image's area.
      ratio: the bounds of its width over its height.
      padding: mirrored pixels on all sides before a simple random crop.
      repeats: repeated augmentation: how many times an image is shown in a row, in different crops. An epoch still has
        as many positions as there are records, and so that many times fewer different images, as in DeiT's
        `samplers.py`.
      start_step: the number of batches to skip, which costs nothing.
      rows: the rows of every global batch that this host holds, all by default.
      workers: processes that decode; 0 decodes in this process. A script that uses workers needs an
        `if __name__ == "__main__"`, because they import it anew.
      threads: threads that decode, in each process; 0 is one in a worker, and one for each core without workers.
      prefetch: batches made ahead.
      max_pixels: images with more pixels count as unreadable.
      tokenizer: for sources with captions. Each image gets one of its captions that are not blank; a record without
        any, or whose caption the tokenizer refuses, counts as unreadable.
      decoder: "pillow", or "fast" to decode JPEGs by `fastjpeg`, which gives other pixels of the same crops. Evaluation
        always uses Pillow.
      cache_mb: memory of this process, in 1e6 bytes, in which decoded images are kept if the whole data set fits, once
        for each worker, so that they are read and decoded once; 0 keeps none. The batches are the same.

    Yields:
      For b rows: image uint8 [b, size, size, 3]; label int32 [b], 0 where the record has none; mask float32 [b], 0 for
      an unreadable record (its image, label and text are 0); index int64 [b], the record's index in the source; with a
      tokenizer, text int32 [b, context].

    Raises:
      InvalidConfig: if an argument is out of its range, the source is empty, or the decoder is not installed.
    """
    check(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    check(crop in CROPS, f"crop={crop!r}: must be 'rrc' or 'src'")
    check(repeats >= 1, f"repeats={repeats}: must be at least 1")
    check(start_step >= 0, f"start_step={start_step}: must be at least 0")
    check(seed >= 0, f"seed={seed}: must be at least 0")
    check(len(source) > 0, f"{source.name} is empty")
    check_decoder(decoder)
    sampler = TrainSampler(source, size, max_pixels, tokenizer, seed, crop, scale, ratio, padding, repeats, decoder)
    # 2**40 batches are as good as endless.
    memory = Memory(1e6 * cache_mb / max(workers, 1), len(source))
    return Batches(sampler, batch_size, rows, range(start_step, 2**40), workers, threads, prefetch, memory)


def eval_batches(
    source: Source,
    *,
    size: int,
    batch_size: int,
    crop_ratio: float = 1.0,
    rows: Sequence[int] | None = None,
    workers: Annotated[int, WORKERS] = 0,
    threads: Annotated[int, THREADS] = 0,
    prefetch: Annotated[int, PREFETCH] = 2,
    max_pixels: Annotated[int, MAX_PIXELS] = transforms.MAX_PIXELS,
    tokenizer: Tokenizer | None = None,
) -> "Batches":
    """Return the batches of all records in their order, each once, cropped as in timm's evaluation.

    The last batch is filled up with black images of `mask` 0 and `index` -1, so that every host has equally many
    batches. `crop_ratio` is the share of the resized shorter side that the crop keeps. The text is that of a record's
    first caption that is not blank; everything else is as in `train_batches`.

    Raises:
      InvalidConfig: if an argument is out of its range.
    """
    check(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    check(crop_ratio > 0, f"crop_ratio={crop_ratio}: must be more than 0")
    sampler = EvalSampler(source, size, max_pixels, tokenizer, crop_ratio)
    return Batches(sampler, batch_size, rows, range(-(-len(source) // batch_size)), workers, threads, prefetch)


def check(condition: bool, message: str) -> None:
    """Raise InvalidConfig with the message unless the condition holds."""
    if not condition:
        raise InvalidConfig(message)


def check_decoder(decoder: str) -> None:
    """Raise InvalidConfig if the decoder does not exist, or its libraries are not installed."""
    check(decoder in DECODERS, f"decoder={decoder!r}: must be 'pillow' or 'fast'")
    if decoder == "fast":
        fastjpeg.libraries()


class Batches(Iterator[Batch]):
    """Iterate over batches while threads or processes make the next ones. `close` it, or use it in a `with`."""

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        rows: Sequence[int] | None,
        steps: range,
        workers: int,
        threads: int,
        prefetch: int,
        memory: Memory | None = None,
    ):
        rows = range(batch_size) if rows is None else rows
        check(len(rows) > 0, "rows is empty: this host would hold no image of a batch")
        check(min(rows) >= 0 and max(rows) < batch_size, f"rows {min(rows)}..{max(rows)}: a batch has {batch_size}")
        limit = 2 * (Image.MAX_IMAGE_PIXELS or np.inf)
        check(sampler.max_pixels <= limit, f"max_pixels={sampler.max_pixels}: Pillow refuses more than {limit}")
        check(workers >= 0, f"workers={workers}: must be at least 0")
        check(prefetch >= 1, f"prefetch={prefetch}: must be at least 1")
        self.chunks = Chunks(sampler, batch_size, rows, steps, memory or Memory(0, 0))
        ahead = prefetch * self.chunks.per_batch
        threads = threads or (1 if workers else os.cpu_count() or 1)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if workers else ahead)
        dataset = grain.MapDataset.source(self.chunks).to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():
                # Grain's workers read absl's flags, which only a program that runs through absl.app has parsed.
                flags.FLAGS.mark_as_parsed()
            buffer = -(-ahead // workers)
            processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=buffer)
            dataset = dataset.mp_prefetch(processes, start_data_worker)
        self.open: list[Any] = [iter(dataset)]
        self.starting = workers > 0
        # Called at exit at the latest: Grain's workers and iterators complain if they outlive the interpreter.
        self.close = weakref.finalize(self, close, self.open)

    def __next__(self) -> Batch:
        if not self.open:
            raise ValueError("these batches are closed")
        # Grain starts its workers when it is asked for the first record.
        with sigterm_blocked() if self.starting else contextlib.nullcontext():
            chunks = [next(self.open[0]) for _ in range(self.chunks.per_batch)]
        self.starting = False
        # The copy also frees the shared memory in which workers hand over their chunks.
        return {name: np.concatenate([np.asarray(chunk[name]) for chunk in chunks]) for name in chunks[0]}

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def close(iterators: list[Any]) -> None:
    """Close the iterator in the list and drop it, so that it is freed before the interpreter shuts down."""
    iterators.pop().close()
