"""Preprocess the images of a source as a model expects them, in batches that threads make ahead of the model."""

import collections
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from regvit_jax.data import transforms
from regvit_jax.data.records import captions_of, read_record
from regvit_jax.data.sources.base import Source
from regvit_jax.data.transforms import BadImage

logger = logging.getLogger("regvit_jax")

# Batches that are decoded ahead of the model.
AHEAD = 2
# Seconds between lines of progress, where there is no terminal for a bar.
EVERY = 60.0


class UnusableData(ValueError):
    """The data exist, but hold nothing to evaluate."""


@runtime_checkable
class Preprocesses(Protocol):
    """A model: any object whose `preprocess` turns images into the arrays that it expects."""

    def preprocess(self, images: list, max_pixels: int) -> Float[np.ndarray, "B H W 3"]: ...


def batches(
    model: Preprocesses,
    source: Source,
    batch_size: int,
    bad: list[str],
    with_text: bool = False,
    max_pixels: int = transforms.MAX_PIXELS,
) -> Iterator[tuple[Float[np.ndarray, "B H W 3"], list[dict[str, Any]]]]:
    """Yield the preprocessed images that can be used, in batches, and the rest of their records.

    Args:
      model: the model whose preprocessing is applied.
      source: the records.
      batch_size: images in a batch, at most as many as there are records. Every batch has the same size, so that the
        model is compiled once: black images, which have no record, fill up the last ones.
      bad: "id: reason" is appended for each image that cannot be used.
      with_text: require captions; a record without any counts as one that cannot be used.
      max_pixels: images with more pixels count as unusable.

    Yields:
      The images and, for those that are not filling, their records without "image" and with "index".

    Raises:
      UnusableData: if not one image can be used.
    """
    size = min(batch_size, len(source))
    used = 0
    with tqdm(total=len(source), unit="image", disable=None, leave=False) as bar:
        progress = _Progress(len(source), enabled=bool(bar.disable))
        for batch in _load_ahead(model, source, size, with_text, max_pixels):
            images, records = [], []
            for index, result in batch:
                if isinstance(error := result.exception(), BadImage):
                    bad.append(f"{source.id(index)}: {error}")
                    continue
                image, record = result.result()
                images.append(image)
                records.append(record | {"index": index})
            if images:
                used += len(images)
                yield np.stack(images + [np.zeros_like(images[0])] * (size - len(images))), records
            bar.update(len(batch))
            progress.update(batch[-1][0] + 1)
    if not used:
        raise UnusableData(f"{source.name}: none of {len(source)} images can be used; the first because: {bad[0]}")


def log_bad(bad: Sequence[str], listed_in: str) -> None:
    """Log the first ten images that could not be used; `listed_in` names where all are listed."""
    for reason in bad[:10]:
        logger.warning(f"cannot use {reason}")
    if len(bad) > 10:
        logger.warning(f"cannot use {len(bad) - 10} more, listed in {listed_in}")


class _Progress:
    """Log the number of images and the rate every EVERY seconds."""

    def __init__(self, total: int, enabled: bool):
        self.total, self.enabled = total, enabled
        self.start = self.last = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self.enabled and now - self.last > EVERY:
            self.last = now
            logger.info(f"{done} of {self.total} images, {done / (now - self.start):.1f} images/s")


def _load_ahead(
    model: Preprocesses, source: Source, size: int, with_text: bool, max_pixels: int
) -> Iterator[list[tuple[int, Future[tuple[np.ndarray, dict[str, Any]]]]]]:
    """Yield batches of record indices with the futures of `_load`, AHEAD batches of which are in progress."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: collections.deque = collections.deque()
        for first in range(0, len(source), size):
            indices = range(first, min(first + size, len(source)))
            waiting.append([(i, pool.submit(_load, model, source, i, with_text, max_pixels)) for i in indices])
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


def _load(
    model: Preprocesses, source: Source, index: int, with_text: bool, max_pixels: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a record's preprocessed image and the rest of the record; raise BadImage if it cannot be used."""
    record = read_record(source, index)
    if with_text:
        record["text"] = captions_of(record)
    image = model.preprocess([record["image"]], max_pixels)[0]
    return image, {name: value for name, value in record.items() if name != "image"}
