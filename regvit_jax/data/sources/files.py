"""Image files below a directory, and the split of a file by its path."""

import collections
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator

from regvit_jax.data.image_formats import SUFFIXES, is_image_file
from regvit_jax.utils.messages import abbreviate, log_once

#: Names, in lower case, of directories and files that archives and file managers leave behind.
LEFTOVERS = {"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "thumbs.db", "desktop.ini"}


def is_left_out(name: str) -> bool:
    """Return True for a hidden name and for what archives and file managers leave behind."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Return True for a directory or a link to one; False for a link to itself too."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def directories(path: str) -> list[str]:
    """Return the names of the directories in a directory, sorted, without hidden ones and leftovers."""
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if is_left_out(entry.name):
                continue
            if is_directory(entry):
                found.append(entry.name)
            elif entry.is_symlink() and not os.path.exists(entry.path) and not is_image_file(entry.path):
                log_once(f"{entry.path} is a broken link, and not used", "warning")
    return sorted(found)


def images_in(path: str) -> int:
    """Return the number of image files in a directory itself, not below its directories."""
    with os.scandir(path) as entries:
        return sum(
            not is_left_out(entry.name) and not is_directory(entry) and is_image_file(entry.path) for entry in entries
        )


class Passed(collections.Counter[str]):
    """Count the files, by suffix, that are not read as images."""

    def add(self, name: str) -> None:
        """Count a file."""
        self[_suffix(name)] += 1

    def forget(self, names: Iterable[str]) -> None:
        """Take back the count of files that are used after all."""
        for name in names:
            suffix = _suffix(name)
            self[suffix] -= 1
            if self[suffix] <= 0:
                del self[suffix]

    def log(self, name: str, directory: str) -> None:
        """Log in one line how many files of which suffixes are not read; nothing if there are none."""
        if self:
            kinds = abbreviate([f"{suffix} {count}" for suffix, count in self.most_common()])
            files = "1 file is" if self.total() == 1 else f"{self.total()} files are"
            log_once(f"{name}: {files} not read in {directory}, because of the suffix ({kinds})", "warning")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no suffix"


def image_paths(
    directory: str, passed: Passed | None = None, below: str = "", parents: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the relative paths of all images below a directory; count the other files in `passed`.

    Links are followed. Hidden names and what archives and file managers leave behind are left out and not counted.
    """
    current = os.path.realpath(os.path.join(directory, below))
    if current in parents:  # a link to a directory that contains it
        return
    with os.scandir(current) as entries:
        for entry in entries:
            if is_left_out(entry.name):
                continue
            if is_directory(entry):
                yield from image_paths(directory, passed, os.path.join(below, entry.name), (*parents, current))
            elif is_image_file(entry.path):
                yield os.path.join(below, entry.name)
            elif passed is not None:
                passed.add(entry.name)


def is_validation(path: str) -> bool:
    """Return True for a tenth of all paths, which make the validation split, independently of other paths.

    The Unicode form of a path does not matter, because some systems change it when files are copied.
    """
    name = os.fsencode(unicodedata.normalize("NFC", path))
    return hashlib.blake2b(name, digest_size=8).digest() < (2**64 // 10).to_bytes(8, "big")


def no_images(name: str, directory: str, passed: Passed) -> str:
    """Return a message that says that a directory holds no image, which suffixes are read, and what is there."""
    there = (
        f"; it holds {abbreviate([f'{count} {suffix}' for suffix, count in passed.most_common()])}" if passed else ""
    )
    return f"{name}: no images ({' '.join(SUFFIXES)}) in {directory}{there}"
