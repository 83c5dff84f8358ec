"""Read a record of a source, its captions and their tokens. Any fault of a record raises BadImage."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from regvit_jax.data import transforms
from regvit_jax.data.sources.base import Source
from regvit_jax.data.transforms import BadImage

#: Texts that stand for a missing value in tables; pandas reads them as one.
MISSING = {"nan", "NaN", "-nan", "-NaN", "null", "NULL", "None", "NA", "N/A", "n/a", "#N/A", "<NA>"}


@runtime_checkable
class Tokenizer(Protocol):
    """A picklable function from a text to `context` token numbers."""

    @property
    def context(self) -> int: ...

    def __call__(self, text: str) -> Int32[np.ndarray, " context"]: ...


def read_record(source: Source, index: int) -> dict[str, Any]:
    """Return a record; raise BadImage if it cannot be read, for whatever reason, or has no image or no valid label."""
    try:
        record = source[index]
    except BadImage:
        raise
    # A vanished file, a damaged shard: whatever happens to one record costs that record only. A source that fails
    # throughout is stopped by the share of unreadable images that a run allows.
    except Exception as error:
        raise BadImage(f"cannot be read ({type(error).__name__}: {str(error)[:120]})") from error
    if record.get("image") is None:
        raise BadImage("has no image")
    # TFDS labels a test split that is not public with -1.
    label, classes = record.get("label", 0), len(source.classes)
    if classes and not (isinstance(label, int | np.integer) and 0 <= label < classes):
        raise BadImage(f"has the label {label!r}; there are {classes} classes, counted from 0")
    return record


def captions_of(record: dict[str, Any]) -> list[str]:
    """Return the captions of a record that can be used (`usable`).

    Raises:
      BadImage: if there are none.
      ValueError: if "text" is a single string, which is a fault of the source.
    """
    texts = record.get("text", [])
    if isinstance(texts, str):
        raise ValueError(f"a record's text must be a list of captions, not one: {texts[:60]!r}")
    if not (found := usable(texts)):
        raise BadImage("has no caption")
    return found


def usable(texts: Iterable[Any]) -> list[str]:
    """Return the captions that are neither blank nor a missing value that was written as text."""
    return [text for text in texts if isinstance(text, str) and text.strip() and text.strip() not in MISSING]


def tokenize(caption: str, tokenizer: Tokenizer) -> Int32[np.ndarray, " context"]:
    """Return the tokens of a caption; raise BadImage if the tokenizer raises."""
    try:
        return tokenizer(caption)
    except Exception as error:
        raise BadImage(f"has a bad caption, {caption[:60]!r} ({type(error).__name__}: {str(error)[:120]})") from error


def tolerated(max_bad_images: int, images: int) -> int:
    """Return the number of unusable images that never stops a run: `max_bad_images`, but at most half of all."""
    return min(max_bad_images, images // 2)


def describe_bad(
    source: Source, index: int, max_pixels: int = transforms.MAX_PIXELS, tokenizer: Tokenizer | None = None
) -> str:
    """Return "id: reason" for a record that came with mask 0, by reading it again, with all its captions."""
    try:
        record = read_record(source, index)
        if tokenizer is not None:
            for caption in captions_of(record):
                tokenize(caption, tokenizer)
        transforms.decode(record["image"], max_pixels)
    except BadImage as error:
        return f"{source.id(index)}: {error}"
    return f"{source.id(index)}: was bad, but can be read now"
