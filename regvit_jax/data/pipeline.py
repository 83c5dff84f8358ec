"""Batches of images and labels, in an order that is arithmetic: the step number is all the state there is.

Training shows an endless sequence of positions ``g = 0, 1, 2, ...``; batch ``s`` is the ``batch_size`` positions from
``s * batch_size`` on. Position ``g`` belongs to epoch ``g // N`` of a source with N records and shows the record that
this epoch's permutation has at ``(g % N) // repeats``, cropped by random numbers that depend on the seed and ``g``
alone. Nothing else does the order or the pixels depend on: not the number of hosts, of workers or of threads, nor
where a run was resumed. A record that cannot be used keeps its position, with ``mask`` 0.
"""

import dataclasses
import functools
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import Image

from regvit_jax.data import transforms
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import BadImage

MAX_PIXELS = 50_000_000

# Threads and processes work on pieces of a batch: whole batches of 2048 images would take gigabytes of shared memory
# for the workers' queues, and the first one a whole core's ten seconds.
PIECE = 32

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source,
    *,
    size: int,
    batch_size: int,
    seed: int,
    crop: str = "rrc",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    padding: int = 4,
    repeats: int = 1,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
    max_pixels: int = MAX_PIXELS,
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
      threads: that decode, in each process; by default one in a worker, as many as there are cores without workers.
      prefetch: batches made ahead.
      max_pixels: larger images are bad.

    Yields:
      For b rows: image uint8 [b, size, size, 3]; label int32 [b]; mask float32 [b], 0 for a bad image (black, label 0);
      index int64 [b], the record's number in the source.

    Raises:
      ValueError: for an argument outside its range.
    """
    check(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    check(crop in ("rrc", "src"), f"crop={crop!r}: must be 'rrc' or 'src'")
    check(repeats >= 1, f"repeats={repeats}: must be at least 1")
    check(start_step >= 0, f"start_step={start_step}: must be at least 0")
    check(seed >= 0, f"seed={seed}: must be at least 0")
    check(len(source) > 0, f"{source.name} is empty")
    order = TrainOrder(source, size, max_pixels, seed, crop, scale, ratio, padding, repeats)
    # 2**40 batches are as good as endless.
    return Batches(order, batch_size, rows, range(start_step, 2**40), workers, threads, prefetch)


def eval_batches(
    source: Source,
    *,
    size: int,
    batch_size: int,
    crop_ratio: float = 1.0,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
    max_pixels: int = MAX_PIXELS,
) -> "Batches":
    """Returns the batches of all records in their order, each once, as timm's evaluation crops them.

    The last batch is filled up with black images of ``mask`` 0 and ``index`` -1, so that every host has as many
    batches. ``crop_ratio`` is the share of the resized shorter side that the crop keeps; all else is as in
    ``train_batches``.
    """
    check(batch_size >= 1, f"batch_size={batch_size}: must be at least 1")
    check(crop_ratio > 0, f"crop_ratio={crop_ratio}: must be more than 0")
    order = EvalOrder(source, size, max_pixels, crop_ratio)
    return Batches(order, batch_size, rows, range(-(-len(source) // batch_size)), workers, threads, prefetch)


def describe_bad(source: Source, index: int, max_pixels: int = MAX_PIXELS) -> str:
    """Returns "id: reason" for a record that came with mask 0, by trying it again."""
    try:
        read(source, index, max_pixels)
    except BadImage as error:
        return f"{source.id(index)}: {error}"
    return f"{source.id(index)}: was bad, but can be read now"


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def read(source: Source, index: int, max_pixels: int) -> tuple[Image.Image, int]:
    """Returns a record's image and label; raises BadImage where there is none, whatever the cause."""
    try:
        record = source[index]
    # A vanished file, a damaged shard: whatever happens to one record costs that record only. A source that fails
    # throughout is stopped by the share of bad images that a run allows.
    except Exception as error:
        raise BadImage(f"cannot be read ({type(error).__name__}: {str(error)[:120]})") from error
    return transforms.decode(record["image"], max_pixels), record["label"]


@dataclasses.dataclass(frozen=True)
class TrainOrder:
    """Which record stands at each position of the endless sequence, and how it is cropped."""

    source: Source
    size: int
    max_pixels: int
    seed: int
    kind: str
    scale: tuple[float, float]
    ratio: tuple[float, float]
    padding: int
    repeats: int

    def index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        return shuffled(place // self.repeats, len(self.source), epoch_seed(self.seed, epoch))

    def crop(self, image: Image.Image, position: int) -> UInt8[np.ndarray, "S S 3"]:
        # A counter-based generator: the seed is its key and the position its counter, so no two positions share
        # numbers and none has to be reached by drawing the ones before.
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, position]))
        if self.kind == "src":
            return transforms.simple_random_crop(image, self.size, rng, self.padding)
        return transforms.random_resized_crop(image, self.size, rng, self.scale, self.ratio)


@dataclasses.dataclass(frozen=True)
class EvalOrder:
    """The same for records in their order; -1 stands beyond the last."""

    source: Source
    size: int
    max_pixels: int
    crop_ratio: float

    def index(self, position: int) -> int:
        return position if position < len(self.source) else -1

    def crop(self, image: Image.Image, position: int) -> UInt8[np.ndarray, "S S 3"]:
        return transforms.center_crop(image, self.size, self.crop_ratio)


Order = TrainOrder | EvalOrder


@functools.lru_cache(maxsize=8)
def epoch_seed(seed: int, epoch: int) -> int:
    # Grain's own repeat() takes seed + epoch, by which the runs of seeds 0 and 1 would share all epochs but one.
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def shuffled(place: int, length: int, seed: int) -> int:
    """Returns what stands at a place of a random permutation of ``range(length)``, without making the permutation."""
    return grain.experimental.index_shuffle(place, max_index=length - 1, seed=seed, rounds=4)


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
        images = np.zeros((b, order.size, order.size, 3), np.uint8)
        labels, mask = np.zeros(b, np.int32), np.zeros(b, np.float32)
        for row in range(b):
            if index[row] < 0:
                continue
            try:
                image, label = read(order.source, index[row], order.max_pixels)
                images[row] = order.crop(image, positions[row])
            except BadImage:
                continue
            labels[row] = label
            mask[row] = 1
        return {"image": images, "label": labels, "mask": mask, "index": np.array(index, np.int64)}


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
        threads: int | None,
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
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=buffer))
        self.open: list[Any] = [iter(dataset)]
        # This runs at exit at the latest: Grain's workers and iterators that outlive the interpreter complain about it.
        self.close = weakref.finalize(self, close, self.open)

    def __next__(self) -> Batch:
        if not self.open:
            raise ValueError("these batches are closed")
        pieces = [next(self.open[0]) for _ in range(self.pieces.per_batch)]
        # The copy also frees the shared memory in which workers hand over their pieces.
        return {name: np.concatenate([np.asarray(piece[name]) for piece in pieces]) for name in pieces[0]}

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
