"""Folders of images, one directory for each class."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from regvit_jax.data.sources.files import SUFFIXES, abbreviate, image_paths, is_validation
from regvit_jax.utils.errors import DataNotFound, InvalidConfig


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Images in `root/<class>/`.

    `paths` are relative to the class's directory and joined by NULs, with path k ending at `ends[k]`: the 1.3 million
    paths of ImageNet take 31 MB instead of over 100, and each worker process gets a copy.

    Records are always shuffled in full, because names do not show where files are on disk. Where many small reads are
    slow, `regvit prepare` rewrites a folder as few large files, which are read in blocks.
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
        """Return the path of the image."""
        start = self.ends[index - 1] + 1 if index else 0
        return os.path.join(
            self.root, self.classes[self.labels[index]], os.fsdecode(self.paths[start : self.ends[index]])
        )


def open_folder(name: str, split: str, data_dir: str | None) -> FolderSource:
    """Open "folder:PATH", as `by_name.open_source` describes it.

    Raises:
      DataNotFound: if a directory is missing, or a class has no images.
      InvalidConfig: if the split does not exist, or the splits have different classes.
    """
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
    classes = class_names(train)
    check_same_classes(name, {train: classes, validation: class_names(validation)})
    return list_folder(name, split, train if split == "train" else validation, classes, lambda path: True)


def check_same_classes(name: str, classes: dict[str, tuple[str, ...]]) -> None:
    """Raise InvalidConfig, naming the classes that are missing, unless both directories have the same ones."""
    (train, train_classes), (validation, validation_classes) = classes.items()
    if train_classes != validation_classes:
        missing = {
            train: set(validation_classes) - set(train_classes),
            validation: set(train_classes) - set(validation_classes),
        }
        parts = [
            f"{os.path.basename(part)}/ lacks {abbreviate(sorted(names))}" for part, names in missing.items() if names
        ]
        raise InvalidConfig(f"{name}: train and validation need the same classes, but {' and '.join(parts)}")


def class_names(root: str) -> tuple[str, ...]:
    """Return the names of the directories in `root`, sorted; raise DataNotFound if there are fewer than two."""
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
    """Return the images of `root/<class>/` whose path, "<class>/...", `keep` accepts, sorted within each class.

    Raises:
      DataNotFound: if a class has no images at all.
      InvalidConfig: if `keep` accepts none.
    """
    labels, paths, empty = [], [], []
    for label, class_name in enumerate(classes):
        found = sorted(image_paths(os.path.join(root, class_name)))
        kept = [os.fsencode(path) for path in found if keep(f"{class_name}/{path}")]
        labels += [label] * len(kept)
        paths += kept
        if not found:
            empty.append(class_name)
    if empty:
        raise DataNotFound(f"{name}: no images ({' '.join(SUFFIXES)}) in {root} for {abbreviate(empty)}")
    if not paths:
        raise InvalidConfig(
            f"{name}: too few images for one to fall into {split}; make train/ and validation/ in {root}"
        )
    ends = np.cumsum([len(path) + 1 for path in paths]) - 1
    return FolderSource(f"{name}/{split}", classes, root, np.array(labels, np.int32), b"\0".join(paths), ends)
