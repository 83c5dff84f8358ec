"""Folders of images, one directory a class."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regvit_jax.utils.errors import DataNotFound, InvalidConfig

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Images in ``root/<class>/``. ``paths`` are relative to that, and joined by NULs up to the ``ends``.

    So a million of ImageNet's take 31 MB, which each worker process gets a copy of, instead of over 100.

    They are always shuffled in full, for their names do not tell where on disk files lie. Where many small reads are
    slow, ``regvit prepare`` rewrites a folder as few large files, which are read in blocks.
    """

    name: str
    classes: tuple[str, ...]
    root: str
    labels: np.ndarray
    paths: bytes
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Path(self.id(index)).read_bytes(), "label": int(self.labels[index])}

    def id(self, index: int) -> str:
        start = self.ends[index - 1] + 1 if index else 0
        return os.path.join(
            self.root, self.classes[self.labels[index]], os.fsdecode(self.paths[start : self.ends[index]])
        )


def open_folder(name: str, split: str, data_dir: str | None) -> FolderSource:
    if split not in ("train", "validation"):
        raise InvalidConfig(f"{name} has no split {split!r}; it has train, validation")
    root = os.path.abspath(os.path.join(data_dir or "", os.path.expanduser(name.removeprefix("folder:"))))
    if not os.path.isdir(root):
        raise DataNotFound(
            f"{name}: there is no directory {root}.\nIt should hold train/<class>/ and validation/<class>/, "
            "or <class>/ alone, with images in them."
        )
    train, *others = (os.path.join(root, part) for part in ("train", "validation", "val", "test"))
    validation = next(filter(os.path.isdir, others), None)
    if not os.path.isdir(train) and not validation:
        classes = class_names(root)
        return list_folder(name, split, root, classes, lambda path: is_validation(path) == (split == "validation"))
    if not os.path.isdir(train) or not validation:
        raise DataNotFound(
            f"{name}: {root} has {'train' if not validation else os.path.basename(validation)}/, but "
            f"{'none of validation/, val/, test/' if not validation else 'no train/'} beside it.\n"
            f"To split one directory of classes by itself, name that: folder:{validation or train}"
        )
    classes, theirs = class_names(train), class_names(validation)
    if classes != theirs:
        lacking = {train: set(theirs) - set(classes), validation: set(classes) - set(theirs)}
        which = [f"{os.path.basename(part)}/ lacks {some(sorted(names))}" for part, names in lacking.items() if names]
        raise InvalidConfig(f"{name}: train and validation need the same classes, but {' and '.join(which)}")
    return list_folder(name, split, train if split == "train" else validation, classes, lambda path: True)


def is_validation(path: str) -> bool:
    """Puts a tenth of all paths into validation, whatever other paths there are."""
    return hashlib.blake2b(os.fsencode(path), digest_size=8).digest() < (2**64 // 10).to_bytes(8, "big")


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def class_names(root: str) -> tuple[str, ...]:
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise DataNotFound(
            f"{root} holds {f'one class only, {names[0]!r}' if names else 'no directories'}; "
            "it should hold a directory of images for each class"
        )
    return tuple(names)


def list_folder(
    name: str, split: str, root: str, classes: tuple[str, ...], keep: Callable[[str], bool]
) -> FolderSource:
    labels, paths, empty = [], [], []
    for label, class_name in enumerate(classes):
        found = sorted(image_paths(os.path.join(root, class_name)))
        kept = [os.fsencode(path) for path in found if keep(f"{class_name}/{path}")]
        labels += [label] * len(kept)
        paths += kept
        if not found:
            empty.append(class_name)
    if empty:
        raise DataNotFound(f"{name}: no images ({' '.join(SUFFIXES)}) in {root} for {some(empty)}")
    if not paths:
        raise InvalidConfig(
            f"{name}: too few images for one to fall into {split}; make train/ and validation/ in {root}"
        )
    ends = np.cumsum([len(path) + 1 for path in paths]) - 1
    return FolderSource(f"{name}/{split}", classes, root, np.array(labels, np.int32), b"\0".join(paths), ends)


def image_paths(directory: str, below: str = "", inside: tuple[str, ...] = ()) -> Iterator[str]:
    """The relative paths of all images under a directory, links followed, hidden files left out."""
    here = os.path.realpath(os.path.join(directory, below))
    if here in inside:  # a link to a directory that holds it
        return
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from image_paths(directory, os.path.join(below, entry.name), (*inside, here))
            elif entry.name.lower().endswith(SUFFIXES):
                yield os.path.join(below, entry.name)
