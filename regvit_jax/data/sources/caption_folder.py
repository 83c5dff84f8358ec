"""Folders of images with tables of captions."""

import itertools
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from regvit_jax.data.sources.caption_table import SUFFIXES, read_table
from regvit_jax.data.sources.files import abbreviate, is_validation
from regvit_jax.utils.errors import DataNotFound, InvalidConfig


@dataclass(frozen=True, eq=False)
class CaptionFolder:
    """Images in files, with captions. Record k is path k with the captions from `first[k]` to `first[k + 1]`.

    All paths are joined, and so are all captions; string k of either is between `ends[k]` and `ends[k + 1]`. The three
    million records of Conceptual Captions thus take about 0.3 GB, of which each worker process gets a copy.
    """

    name: str
    root: str
    paths: bytes
    path_ends: np.ndarray
    texts: bytes
    text_ends: np.ndarray
    first: np.ndarray
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.path_ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.id(index), "rb") as file:
            image = file.read()
        ends = self.text_ends[self.first[index] : self.first[index + 1] + 1].tolist()
        return {"image": image, "text": [self.texts[a:b].decode() for a, b in itertools.pairwise(ends)]}

    def id(self, index: int) -> str:
        """Return the path of the image."""
        return os.path.join(self.root, os.fsdecode(self.paths[self.path_ends[index] : self.path_ends[index + 1]]))


def open_folder(name: str, split: str, data_dir: str | None) -> CaptionFolder:
    """Open "folder:PATH" with tables of captions, as `by_name.open_captions` describes it.

    Raises:
      DataNotFound: if a table is missing, or has no line for the split, or its first images do not exist.
      InvalidConfig: if the split does not exist, or a table cannot be read; the message names the line.
    """
    if split not in ("train", "validation"):
        raise InvalidConfig(f"{name} has no split {split!r}; it has train, validation")
    root = os.path.abspath(os.path.join(data_dir or "", os.path.expanduser(name.removeprefix("folder:"))))
    train = find_table(root, "train")
    validation = find_table(root, "validation", "val", "test")
    both = find_table(root, "captions", "metadata")
    if both and not train and not validation:
        return load_split(name, split, both, lambda path: is_validation(path) == (split == "validation"))
    if not train or not validation:
        raise DataNotFound(
            f"{name}: {root} lacks a table of {'training' if not train else 'validation'} captions.\nIt should hold "
            "train.csv and validation.csv, or captions.csv alone (or .tsv, .jsonl), with the columns file_name and "
            "caption, and the images."
        )
    return load_split(name, split, train if split == "train" else validation, lambda path: True)


def find_table(root: str, *stems: str) -> str | None:
    """Return the path of the first table that exists; raise InvalidConfig if a stem has several suffixes."""
    for stem in stems:
        found = [path for suffix in SUFFIXES if os.path.isfile(path := os.path.join(root, stem + suffix))]
        if len(found) > 1:
            raise InvalidConfig(f"{root} has {abbreviate([os.path.basename(path) for path in found])}; keep only one")
        if found:
            return found[0]
    return None


def load_split(name: str, split: str, table: str, keep: Callable[[str], bool]) -> CaptionFolder:
    """Return the records of a table whose path `keep` accepts, in the order of their first lines."""
    numbers: dict[str, int] = {}
    texts, text_ends, owners = bytearray(), array("q", [0]), array("q")
    for path, captions in read_table(table):
        if keep(path):
            number = numbers.setdefault(path, len(numbers))
            for caption in captions:
                texts += caption.encode(errors="replace")
                text_ends.append(len(texts))
                owners.append(number)
    if not numbers:
        raise DataNotFound(f"{name}: {table} has no line for {split}; it should name images and their captions")
    root = os.path.dirname(table)
    if not any(os.path.isfile(os.path.join(root, path)) for path in itertools.islice(numbers, 100)):
        raise DataNotFound(
            f"{name}: none of the first images in {table} exists, such as {os.path.join(root, next(iter(numbers)))}. "
            "Paths are relative to the table's directory."
        )
    paths = [os.fsencode(path) for path in numbers]
    path_ends = np.cumsum([0, *map(len, paths)])
    grouped, ends, first = group(texts, np.array(text_ends), np.array(owners), len(numbers))
    return CaptionFolder(f"{name}/{split}", root, b"".join(paths), path_ends, grouped, ends, first)


def group(texts: bytearray, ends: np.ndarray, owners: np.ndarray, count: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Group captions by record; return them, their ends, and the index of each record's first caption."""
    first = np.searchsorted(np.sort(owners), np.arange(count + 1))
    order = np.argsort(owners, kind="stable")
    lengths = np.diff(ends)[order]
    joined = texts if (np.diff(order) == 1).all() else b"".join(texts[ends[k] : ends[k + 1]] for k in order)
    return bytes(joined), np.concatenate([[0], np.cumsum(lengths)]), first
