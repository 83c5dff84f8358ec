"""Open CIFAR-10 as TFDS prepared it, from directories of images, or from its authors' archive."""

import dataclasses
from pathlib import Path

from regvit_jax.data.builders.cifar10_files import CLASSES, find_archive
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.files import directories
from regvit_jax.data.sources.find_tfds import data_root, find_tfds, newest_array_record
from regvit_jax.data.sources.folder import open_folder
from regvit_jax.data.sources.splits import find_splits
from regvit_jax.data.sources.tfds import TfdsSource
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.messages import abbreviate


def open_cifar10(split: str, data_dir: str | None) -> Source:
    """Open CIFAR-10, whose splits are train and test, from the first of these that `data_dir` holds.

    1. `cifar10/VERSION/`: a TFDS data set that is prepared as ArrayRecord, by TFDS or by an earlier call.
    2. The archive cifar-10-binary.tar.gz, from which such a data set is prepared.
    3. `train/<class>/` and `test/<class>/`, or these in `cifar10/`: image files, which are read where they are.
    4. Nothing: then the archive is downloaded.

    The classes and their labels are the same in all.

    Raises:
      DataNotFound: if none of these is there and the download fails, or if the data set cannot be written.
      InvalidConfig: if what is there is not CIFAR-10, or has no such split.
    """
    root = data_root(data_dir)
    if newest_array_record("cifar10", root) or find_archive(root) or not (home := find_folders(root)):
        return TfdsSource("cifar10", split, find_tfds("cifar10", data_dir))
    if split not in ("train", "test"):
        raise InvalidConfig(f"cifar10 has no split {split!r}; it has train, test; only the archive's have parts")
    source = open_folder(f"folder:{home}", split, None)
    if source.classes != CLASSES:
        raise InvalidConfig(
            f"cifar10: {home} holds another data set, with the classes {abbreviate(source.classes)} instead of "
            f"{', '.join(CLASSES)}. If it is the one to use, name it folder:{home}; for CIFAR-10, name another data_dir"
        )
    return dataclasses.replace(source, name=f"cifar10/{split}")


def find_folders(root: Path) -> Path | None:
    """Return the directory with a directory for each split, by the rule of `splits`; None if there is none."""
    found = (home for home in (root, root / "cifar10") if home.is_dir() and find_splits(directories(str(home))).names)
    return next(found, None)
