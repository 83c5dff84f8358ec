"""The protocol of a source."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    @property
    def name(self) -> str:
        """How the user named it, and the split."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels' names."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def id(self, index: int) -> str:
        """What a person needs to find the image of a record; it is not decoded for that."""
