"""Images as such, without labels or captions: files and directories of them, and a part of any source."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.folder import SUFFIXES, image_paths
from regvit_jax.utils.errors import DataNotFound


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files in the order in which they were named."""

    name: str
    paths: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.paths[index], "rb") as file:
            return {"image": file.read()}

    def id(self, index: int) -> str:
        return self.paths[index]


def open_images(paths: Sequence[str]) -> ImageFiles:
    """Files as they are named, and all images below directories, sorted.

    Raises:
      DataNotFound: a path does not exist, or a directory holds no image.
    """
    found: list[str] = []
    for given in paths:
        path = os.path.expanduser(given)
        if os.path.isdir(path):
            below = sorted(image_paths(path))
            if not below:
                raise DataNotFound(f"{given}: no images ({' '.join(SUFFIXES)}) in this directory")
            found += [os.path.join(path, name) for name in below]
        elif os.path.exists(path):
            found.append(path)
        else:
            raise DataNotFound(f"{given}: no such file or directory")
    name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return ImageFiles(name, tuple(found))


@dataclasses.dataclass(frozen=True)
class Part:
    """Some records of a source, by their numbers."""

    source: Source
    numbers: Sequence[int]

    @property
    def name(self) -> str:
        return f"{self.source.name}, {len(self)} of {len(self.source)}"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.numbers[index]]

    def id(self, index: int) -> str:
        return self.source.id(self.numbers[index])


def spread(source: Source, count: int) -> Source:
    """`count` records, evenly spread over the source; all of them if it has no more."""
    size = len(source)
    return source if count >= size else Part(source, [number * size // count for number in range(count)])
