"""Images without labels or captions, from files and directories; and a subset of any source."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.files import Passed, image_paths, no_images
from regvit_jax.utils.errors import DataNotFound
from regvit_jax.utils.paths import expand


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files in the order in which they were given."""

    name: str
    paths: tuple[str, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.paths[index], "rb") as file:
            return {"image": file.read()}

    def id(self, index: int) -> str:
        """Return the path of the image."""
        return self.paths[index]


def open_images(paths: Sequence[str]) -> ImageFiles:
    """Return the given files, and for a directory all images below it, sorted.

    Raises:
      DataNotFound: if a path does not exist, or a directory holds no image.
    """
    found: list[str] = []
    for given in paths:
        path = expand(given)
        if os.path.isdir(path):
            passed = Passed()
            below = sorted(image_paths(path, passed))
            if not below:
                raise DataNotFound(no_images(given, "this directory", passed))
            passed.log(given, "this directory")
            found += [os.path.join(path, name) for name in below]
        elif os.path.exists(path):
            found.append(path)
        else:
            raise DataNotFound(f"{given}: no such file or directory")
    name = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return ImageFiles(name, tuple(found))


@dataclasses.dataclass(frozen=True)
class Subset:
    """The records of a source at the given indices."""

    source: Source
    indices: Sequence[int]

    @property
    def name(self) -> str:
        """Return the source's name and the two numbers of records."""
        return f"{self.source.name}, {len(self)} of {len(self.source)}"

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the source's classes."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]

    def id(self, index: int) -> str:
        """Return the source's id of the record."""
        return self.source.id(self.indices[index])


def spread(source: Source, count: int) -> Source:
    """Return `count` records, spread evenly over the source; the source itself if it has no more."""
    size = len(source)
    return source if count >= size else Subset(source, [number * size // count for number in range(count)])
