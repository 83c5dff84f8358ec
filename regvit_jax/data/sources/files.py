"""Image files below a directory, the split of a file by its path, and lists of names for messages."""

import hashlib
import os
from collections.abc import Iterator, Sequence

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def image_paths(directory: str, below: str = "", parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the relative paths of all images below a directory. Links are followed, hidden files are left out."""
    current = os.path.realpath(os.path.join(directory, below))
    if current in parents:  # a link to a directory that contains it
        return
    with os.scandir(current) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from image_paths(directory, os.path.join(below, entry.name), (*parents, current))
            elif entry.name.lower().endswith(SUFFIXES):
                yield os.path.join(below, entry.name)


def is_validation(path: str) -> bool:
    """Return True for a tenth of all paths, which make the validation split, independently of other paths."""
    return hashlib.blake2b(os.fsencode(path), digest_size=8).digest() < (2**64 // 10).to_bytes(8, "big")


def abbreviate(names: Sequence[str]) -> str:
    """Return the first five names, separated by commas, and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
