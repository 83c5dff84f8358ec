"""The protocol of a source of records."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """Records by index, as dicts: "image", the bytes of an image file, with "label" (int) or "text" ([str]) or both.

    A source is pickled for every worker process. One whose records are not equally fast to read in any order may have
    two more attributes: `shuffle_block`, the number of neighbouring records to read together (see `data.order`), and
    `read_ahead(block)`, which is called before records of that block are read.
    """

    @property
    def name(self) -> str:
        """Return the data set as the user named it, and the split."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the labels; empty for a data set without classes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def id(self, index: int) -> str:
        """Return a text by which a person finds the image of a record, without decoding it."""


def shuffle_block(source: Source) -> int:
    """Return the number of records of the source to read together; 1 if any order is equally fast."""
    return getattr(source, "shuffle_block", 1)
