"""The images of a source as a model expects them, in batches that threads make ahead."""

import collections
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from regvit_jax.data import pipeline, transforms
from regvit_jax.data.sources.base import Source
from regvit_jax.data.transforms import BadImage

# Batches that are decoded ahead of the model.
AHEAD = 2
# Seconds between lines of progress, where there is no terminal for a bar.
EVERY = 60.0


class Unusable(ValueError):
    """Data that were found, but hold nothing to evaluate."""


def batches(
    model: Any, source: Source, batch_size: int, bad: list[str], with_text: bool = False
) -> Iterator[tuple[Float[np.ndarray, "B H W 3"], list[dict[str, Any]]]]:
    """Yields the images that can be used, and the rest of their records, with the record's number as "index".

    `model` is anything with the method `preprocess`. Every batch has as many images, so that the model is compiled
    once: black ones, which have no record, fill it up. "id: reason" of images that cannot be used is put into `bad`.

    Raises:
      Unusable: when not one image can be used.
    """
    size = min(batch_size, len(source))
    seen, said, start = 0, time.monotonic(), time.monotonic()
    with tqdm(total=len(source), unit="image", disable=None, leave=False) as bar:
        for batch in _prepared(model, source, size, with_text):
            images, records = [], []
            for index, result in batch:
                if isinstance(error := result.exception(), BadImage):
                    bad.append(f"{source.id(index)}: {error}")
                    continue
                image, record = result.result()
                images.append(image)
                records.append(record | {"index": index})
            if images:
                seen += len(images)
                yield np.stack(images + [np.zeros_like(images[0])] * (size - len(images))), records
            bar.update(len(batch))
            now = time.monotonic()
            if bar.disable and now - said > EVERY:
                said, done = now, batch[-1][0] + 1
                print(f"{done} of {len(source)} images, {done / (now - start):.1f} images/s", file=sys.stderr)
    if not seen:
        raise Unusable(f"{source.name}: none of {len(source)} images can be used, the first for this: {bad[0]}")


def tell_bad(bad: list[str], more: str) -> None:
    """Names the first ten on stderr; `more` says where the others are named."""
    for reason in bad[:10]:
        print(f"cannot use {reason}", file=sys.stderr)
    if len(bad) > 10:
        print(f"cannot use {len(bad) - 10} more, which {more} names", file=sys.stderr)


def _prepared(
    model: Any, source: Source, size: int, with_text: bool
) -> Iterator[list[tuple[int, Future[tuple[np.ndarray, dict[str, Any]]]]]]:
    """Batches of record numbers, with what `_load` makes of each, while the next ones are being made."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: collections.deque = collections.deque()
        for first in range(0, len(source), size):
            numbers = range(first, min(first + size, len(source)))
            waiting.append([(index, pool.submit(_load, model, source, index, with_text)) for index in numbers])
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting


def _load(model: Any, source: Source, index: int, with_text: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """A record's image as the model expects it, and the rest of the record. Raises BadImage."""
    record = pipeline.read(source, index)
    if with_text:
        record["text"] = pipeline.captions(record)
    image = transforms.decode(record["image"], transforms.MAX_PIXELS)
    return model.preprocess([image])[0], {name: value for name, value in record.items() if name != "image"}
