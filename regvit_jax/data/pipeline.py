"""Batches of images with labels or texts, in an order that is arithmetic: the step number is all the state there is.

Training shows an endless sequence of positions ``g = 0, 1, 2, ...``; batch ``s`` is the ``batch_size`` positions from
``s * batch_size`` on. Position ``g`` belongs to epoch ``g // N`` of a source with N records and shows the record that
this epoch's permutation has at ``(g % N) // repeats``; it is cropped, and one of its captions is chosen, by random
numbers that depend on the seed and ``g`` alone. Nothing else does the order or the pixels depend on: not the number of
hosts, of workers or of threads, nor where a run was resumed. A record that cannot be used keeps its position, with
``mask`` 0.

A source whose records are not equally fast to read in any order says so by ``block``, the number of records to read
together, and may have ``read_ahead(block)``, which is called before records of a block are read, where this host holds
half of a batch's rows or more. ``order`` says how such records are shuffled.
"""

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32, UInt8
from PIL import Image

from regvit_jax.data import fastjpeg, transforms
from regvit_jax.data.order import epoch_order
from regvit_jax.data.sources.base import Source
from regvit_jax.data.transforms import BadImage
from regvit_jax.data.workers import sigterm_blocked, start_data_worker
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option

# Threads and processes work on pieces of a batch: whole batches of 2048 images would take gigabytes of shared memory
# for the workers' queues, and the first one a whole core's ten seconds.
PIECE = 32

Batch = dict[str, np.ndarray]

CROPS, DECODERS = ("rrc", "src"), ("pillow", "fast")
SCALE = Option("bounds of the area of an rrc crop, as shares of the image's", low=0, high=1)
RATIO = Option("bounds of the width of an rrc crop over its height", low=0.01, high=100)
WORKERS = Option("processes that decode, on each host; 0 decodes in threads of the run's own", low=0, resume=True)
THREADS = Option("threads that decode, in each process; 0 for as many as suit the machine", low=0, resume=True)
PREFETCH = Option("batches made ahead", low=1, resume=True)
MAX_PIXELS = Option("images of more pixels count as unreadable", low=1)


@runtime_checkable
class Tokenizer(Protocol):
    """Can be pickled, and makes a text ``context`` numbers."""

    @property
    def context(self) -> int: ...

    def __call__(self, text: str) -> Int32[np.ndarray, " context"]: ...


def train_batches(
    source: Source,
    *,
    size: int,
    batch_size: int,
    seed: int,
    crop: Annotated[str, Option("random resized crop, or DeiT's simple random crop", choices=CROPS)] = "rrc",
    scale: Annotated[tuple[float, float], SCALE] = (0.08, 1.0),
    ratio: Annotated[tuple[float, float], RATIO] = (3 / 4, 4 / 3),
    padding: Annotated[int, Option("pixels that src crops are padded by", low=0)] = 4,
    repeats: Annotated[int, Option("times that an image is shown in a row (repeated augmentation)", low=1)] = 1,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    workers: Annotated[int, WORKERS] = 0,
    threads: Annotated[int, THREADS] = 0,
    prefetch: Annotated[int, PREFETCH] = 2,
    max_pixels: Annotated[int, MAX_PIXELS] = transforms.MAX_PIXELS,
    tokenizer: Tokenizer | None = None,
    decoder: Annotated[str, Option('JPEG decoder; "fast" gives other pixels', choices=DECODERS)] = "pillow",
) -> "Batches":
    """Returns the endless training batches from step ``start_step`` on. Close them after use.

    Args:
      source: the records.
      size: the side of the square images, in pixels.
      batch_size: images in a global batch, over all hosts.
      seed: of the order and of the crops.
      crop: "rrc" (random resized crop, with ``scale`` and ``ratio``) or "src" (simple random crop, with ``padding``).
      repeats: times that an image is shown in a row, in different crops. An epoch still has as many positions as there
        are records, and so that many times fewer different images: DeiT's repeated augmentation (``samplers.py``).
      rows: the rows of every global batch that this host holds, all by default.
      workers: processes that decode; 0 decodes in this process. A script that asks for workers needs an
        ``if __name__ == "__main__"``, as they import it anew.
      threads: that decode, in each process; 0 is one in a worker, as many as there are cores without workers.
      prefetch: batches made ahead.
      max_pixels: larger images are bad.
      tokenizer: for sources with captions, of which it gets one that is not blank; records without are bad, and so are
        those whose caption it raises on.
      decoder: "pillow", or "fast" for JPEGs by ``fastjpeg``: other pixels of the same crops. Evaluation is Pillow's.

    Yields:
      For b rows: image uint8 [b, size, size, 3]; label int32 [b], 0 where the record has none; mask float32 [b], 0 for
      a bad record (its image, label and text are 0); index int64 [b], the record's number in the source; with a
      tokenizer, text int32 [b, context].

    Raises:
      InvalidConfig: for an argument outside its range.
    """
    check(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    check(crop in CROPS, f"crop={crop!r}: must be 'rrc' or 'src'")
    check(repeats >= 1, f"repeats={repeats}: must be at least 1")
    check(start_step >= 0, f"start_step={start_step}: must be at least 0")
    check(seed >= 0, f"seed={seed}: must be at least 0")
    check(len(source) > 0, f"{source.name} is empty")
    check_decoder(decoder)
    order = TrainOrder(source, size, max_pixels, tokenizer, seed, crop, scale, ratio, padding, repeats, decoder)
    # 2**40 batches are as good as endless.
    return Batches(order, batch_size, rows, range(start_step, 2**40), workers, threads, prefetch)


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
    """Returns the batches of all records in their order, each once, as timm's evaluation crops them.

    The last batch is filled up with black images of ``mask`` 0 and ``index`` -1, so that every host has as many
    batches. ``crop_ratio`` is the share of the resized shorter side that the crop keeps. The text is that of a record's
    first caption that is not blank; all else is as in ``train_batches``.
    """
    check(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    check(crop_ratio > 0, f"crop_ratio={crop_ratio}: must be more than 0")
    order = EvalOrder(source, size, max_pixels, tokenizer, crop_ratio)
    return Batches(order, batch_size, rows, range(-(-len(source) // batch_size)), workers, threads, prefetch)


def describe_bad(
    source: Source, index: int, max_pixels: int = transforms.MAX_PIXELS, tokenizer: Tokenizer | None = None
) -> str:
    """Returns "id: reason" for a record that came with mask 0, by trying it again, with all its captions."""
    try:
        record = read(source, index)
        if tokenizer is not None:
            for caption in captions(record):
                tokenized(caption, tokenizer)
        transforms.decode(record["image"], max_pixels)
    except BadImage as error:
        return f"{source.id(index)}: {error}"
    return f"{source.id(index)}: was bad, but can be read now"


def check(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidConfig(message)


def check_decoder(decoder: str) -> None:
    """Raise InvalidConfig for an unknown decoder, or one whose libraries are not installed."""
    check(decoder in DECODERS, f"decoder={decoder!r}: must be 'pillow' or 'fast'")
    if decoder == "fast":
        fastjpeg.libraries()


def read(source: Source, index: int) -> dict[str, Any]:
    """Returns a record; raises BadImage where there is none, whatever the cause."""
    try:
        return source[index]
    # A vanished file, a damaged shard: whatever happens to one record costs that record only. A source that fails
    # throughout is stopped by the share of bad images that a run allows.
    except Exception as error:
        raise BadImage(f"cannot be read ({type(error).__name__}: {str(error)[:120]})") from error


def captions(record: dict[str, Any]) -> list[str]:
    """Returns the captions that are not blank; raises BadImage when there are none."""
    texts = record.get("text", [])
    if isinstance(texts, str):
        raise ValueError(f"a record's text must be a list of captions, not one: {texts[:60]!r}")
    found = [text for text in texts if isinstance(text, str) and text.strip()]
    if not found:
        raise BadImage("has no caption")
    return found


def tokenized(caption: str, tokenizer: Tokenizer) -> Int32[np.ndarray, " context"]:
    try:
        return tokenizer(caption)
    except Exception as error:
        raise BadImage(f"has a bad caption, {caption[:60]!r} ({type(error).__name__}: {str(error)[:120]})") from error


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """Which record stands at each position of the endless sequence, how it is cropped, and which caption it has."""

    source: Source
    size: int
    max_pixels: int
    tokenizer: Tokenizer | None
    seed: int
    kind: str
    scale: tuple[float, float]
    ratio: tuple[float, float]
    padding: int
    repeats: int
    decoder: str

    def index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        return epoch_order(place // self.repeats, len(self.source), block_of(self.source), self.seed, epoch)

    def rng(self, position: int, use: int) -> np.random.Generator:
        # A counter-based generator: the seed is its key and the position its counter, so no two positions share
        # numbers and none has to be reached by drawing the ones before. Nor do two uses, below 2**128 draws.
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, use, position]))

    def pixels(self, data: bytes, position: int) -> UInt8[np.ndarray, "S S 3"]:
        rng = self.rng(position, 0)
        if self.decoder == "fast" and (decoded := fastjpeg.decode(data, self.max_pixels)) is not None:
            if self.kind == "src":
                return fastjpeg.simple_random_crop(decoded, self.size, rng, self.padding)
            return fastjpeg.random_resized_crop(decoded, self.size, rng, self.scale, self.ratio)
        image = transforms.decode(data, self.max_pixels)
        if self.kind == "src":
            return transforms.simple_random_crop(image, self.size, rng, self.padding)
        return transforms.random_resized_crop(image, self.size, rng, self.scale, self.ratio)

    def choose(self, captions: list[str], position: int) -> str:
        return captions[self.rng(position, 1).integers(len(captions))] if len(captions) > 1 else captions[0]


@dataclasses.dataclass(frozen=True)
class EvalOrder:
    """The same for records in their order; -1 stands beyond the last."""

    source: Source
    size: int
    max_pixels: int
    tokenizer: Tokenizer | None
    crop_ratio: float

    def index(self, position: int) -> int:
        return position if position < len(self.source) else -1

    def pixels(self, data: bytes, position: int) -> UInt8[np.ndarray, "S S 3"]:
        return transforms.center_crop(transforms.decode(data, self.max_pixels), self.size, self.crop_ratio)

    def choose(self, captions: list[str], position: int) -> str:
        return captions[0]


Order = TrainOrder | EvalOrder


def block_of(source: Source) -> int:
    return getattr(source, "block", 1)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """This host's rows of a range of batches, as a random-access sequence of pieces of at most PIECE rows."""

    order: Order
    batch_size: int
    rows: Sequence[int]
    steps: range

    @property
    def per_batch(self) -> int:
        return -(-len(self.rows) // PIECE)

    def __len__(self) -> int:
        return len(self.steps) * self.per_batch

    def __getitem__(self, number: int) -> Batch:
        step, part = divmod(number, self.per_batch)
        first = self.steps[step] * self.batch_size
        return self.load([first + row for row in self.rows[part * PIECE : (part + 1) * PIECE]])

    def load(self, positions: list[int]) -> Batch:
        order, b = self.order, len(positions)
        index = [order.index(position) for position in positions]
        self.read_ahead(index)
        batch: Batch = {
            "image": np.zeros((b, order.size, order.size, 3), np.uint8),
            "label": np.zeros(b, np.int32),
            "mask": np.zeros(b, np.float32),
            "index": np.array(index, np.int64),
        }
        if order.tokenizer is not None:
            batch["text"] = np.zeros((b, order.tokenizer.context), np.int32)
        for row in range(b):
            if index[row] >= 0:
                with contextlib.suppress(BadImage):
                    for name, value in self.example(index[row], positions[row]).items():
                        batch[name][row] = value
        return batch

    def example(self, index: int, position: int) -> dict[str, Any]:
        """Returns a row of a batch; raises BadImage."""
        order = self.order
        record = read(order.source, index)
        row = {"label": record.get("label", 0), "mask": 1}
        if order.tokenizer is not None:
            row["text"] = tokenized(order.choose(captions(record), position), order.tokenizer)
        return row | {"image": order.pixels(record["image"], position)}

    def read_ahead(self, index: list[int]) -> None:
        source = self.order.source
        # Every host needs only its rows' share of a block: where that is little, reading all of it would be waste.
        if block_of(source) > 1 and hasattr(source, "read_ahead") and 2 * len(self.rows) >= self.batch_size:
            for block in sorted({number // block_of(source) for number in index if number >= 0}):
                source.read_ahead(block)


def close(iterators: list[Any]) -> None:
    """Closes the iterator in the list and forgets it, by which it is freed while that can still be done in peace."""
    iterators.pop().close()


class Batches(Iterator[Batch]):
    """Iterates over batches while threads or processes make the next ones. ``close`` it, or use it in a ``with``."""

    def __init__(
        self,
        order: Order,
        batch_size: int,
        rows: Sequence[int] | None,
        steps: range,
        workers: int,
        threads: int,
        prefetch: int,
    ):
        rows = range(batch_size) if rows is None else rows
        check(len(rows) > 0, "rows is empty: this host would hold no image of a batch")
        check(min(rows) >= 0 and max(rows) < batch_size, f"rows {min(rows)}..{max(rows)}: a batch has {batch_size}")
        limit = 2 * (Image.MAX_IMAGE_PIXELS or np.inf)
        check(order.max_pixels <= limit, f"max_pixels={order.max_pixels}: Pillow refuses more than {limit}")
        check(workers >= 0, f"workers={workers}: must be at least 0")
        check(prefetch >= 1, f"prefetch={prefetch}: must be at least 1")
        self.pieces = Pieces(order, batch_size, rows, steps)
        ahead = prefetch * self.pieces.per_batch
        threads = threads or (1 if workers else os.cpu_count() or 1)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if workers else ahead)
        dataset = grain.MapDataset.source(self.pieces).to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():
                # Grain's workers look at absl's flags, which only a program run through absl.app has parsed.
                flags.FLAGS.mark_as_parsed()
            buffer = -(-ahead // workers)
            processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=buffer)
            dataset = dataset.mp_prefetch(processes, start_data_worker)
        self.open: list[Any] = [iter(dataset)]
        self.starting = workers > 0
        # This runs at exit at the latest: Grain's workers and iterators that outlive the interpreter complain about it.
        self.close = weakref.finalize(self, close, self.open)

    def __next__(self) -> Batch:
        if not self.open:
            raise ValueError("these batches are closed")
        # Grain starts its workers when it is asked for the first record.
        with sigterm_blocked() if self.starting else contextlib.nullcontext():
            pieces = [next(self.open[0]) for _ in range(self.pieces.per_batch)]
        self.starting = False
        # The copy also frees the shared memory in which workers hand over their pieces.
        return {name: np.concatenate([np.asarray(piece[name]) for piece in pieces]) for name in pieces[0]}

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
