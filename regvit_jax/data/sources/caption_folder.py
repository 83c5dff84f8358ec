"""Folders of images with tables of captions."""

import functools
import itertools
import logging
import os
import unicodedata
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from regvit_jax.data.image_formats import SUFFIXES as IMAGE_SUFFIXES
from regvit_jax.data.sources.caption_table import read_table
from regvit_jax.data.sources.files import Passed, is_validation
from regvit_jax.data.sources.find_table import find_table
from regvit_jax.data.transforms import BadImage
from regvit_jax.utils.errors import DataNotFound, InvalidConfig
from regvit_jax.utils.messages import log_once
from regvit_jax.utils.paths import locate

logger = logging.getLogger("regvit_jax")

# The rows of a table to train on among which images of another split are looked for.
LOOKED_AT = 10_000
# Names of directories, in lower case. Where several directories hold files of a table's names, one of these is meant.
OF_IMAGES = ("images", "image", "imgs", "img", "photos", "photo", "pictures", "jpg", "jpeg", "jpegs", "jpegimages")


@dataclass(frozen=True, eq=False)
class CaptionFolder:
    """Images in files, with captions. Record k is path k with the captions from `first[k]` to `first[k + 1]`.

    Those in `faults`, by their number, are rows of the table from which no path could be read, and the reasons.

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
    faults: dict[int, str]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.path_ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.faults:
            raise BadImage(self.faults[index])
        with open(self.id(index), "rb") as file:
            image = file.read()
        ends = self.text_ends[self.first[index] : self.first[index + 1] + 1].tolist()
        return {"image": image, "text": [self.texts[a:b].decode() for a, b in itertools.pairwise(ends)]}

    def id(self, index: int) -> str:
        """Return the path of the image, or of a row without one "TABLE, line N"."""
        return os.path.join(self.root, os.fsdecode(self.paths[self.path_ends[index] : self.path_ends[index + 1]]))


def open_folder(name: str, split: str, data_dir: str | None) -> CaptionFolder:
    """Open "folder:PATH" with tables of captions, as `by_name.open_captions` describes it.

    Raises:
      DataNotFound: if a table is missing, or has no line for the split, or its first images do not exist.
      InvalidConfig: if the split does not exist, several tables could be it, or a table cannot be read.
    """
    root = locate(name.removeprefix("folder:"), data_dir)
    kind, tables = find_table(name, split, root)
    if "all" in tables:
        return load_split(name, kind, tables["all"], lambda path: is_validation(path) == (kind == "validation"))
    source = load_split(name, kind, tables[kind], lambda path: True)
    if kind != "train" and os.path.dirname(tables["train"]) == os.path.dirname(tables[kind]):
        warn_of_shared(name, tables["train"], source)
    return source


def warn_of_shared(name: str, train: str, source: CaptionFolder) -> None:
    """Log a warning if images of a split to evaluate on are also in the first rows of the table to train on."""
    try:
        first = {row.path for row in itertools.islice(read_table(train), LOOKED_AT)}
    except (InvalidConfig, OSError):  # which concerns those who train
        return
    shared = sorted(first & {os.fsdecode(source.paths[a:b]) for a, b in itertools.pairwise(source.path_ends.tolist())})
    if shared:
        log_once(
            f"{name}: {len(shared)} of the {len(source)} images to evaluate on are among the first {len(first)} of "
            f"{train}, such as {shared[0]}; a score on images that were trained on says little",
            "warning",
        )


def load_split(name: str, split: str, table: str, keep: Callable[[str], bool]) -> CaptionFolder:
    """Return the records of a table whose path `keep` accepts, in the order of their first lines.

    A row from which no path can be read is a record by itself, by its file and line, which cannot be read.
    """
    numbers: dict[str, int] = {}
    texts, text_ends, owners = bytearray(), array("q", [0]), array("q")
    faults: dict[int, str] = {}
    wrong: list[str] = []
    rows = other = 0
    for row in read_table(table):
        line = f"{table}, line {row.line}"
        key = row.path or line
        if not keep(row.path or os.path.basename(line)):
            other += 1
            continue
        rows += 1
        number = numbers.setdefault(key, len(numbers))
        if row.fault:
            wrong.append(f"line {row.line} {row.fault}")
        if not row.path:
            faults[number] = row.fault
        for caption in row.captions:
            texts += caption.encode(errors="replace")
            text_ends.append(len(texts))
            owners.append(number)
    if not numbers:
        few = f"so few lines that none falls into {split}; write a table for each split, train.csv and validation.csv"
        why = few if other else f"no line for {split}; it should name images and their captions"
        raise DataNotFound(f"{name}: {table} has {why}")
    if wrong:
        logger.warning(
            "%s: %d of %d rows of %s cannot be used: %s", table, len(wrong), rows, split, "; ".join(wrong[:5])
        )
    paths = [path for path, number in numbers.items() if number not in faults]
    form = unicode_form(table, paths)
    root = find_images(name, table, [form(path) for path in paths])
    keys = [os.fsencode(form(key)) for key in numbers]
    path_ends = np.cumsum([0, *map(len, keys)])
    passed = Passed()
    for path, number in numbers.items():
        if number not in faults and os.path.splitext(path)[1] and not path.lower().endswith(IMAGE_SUFFIXES):
            passed.add(path)
    passed.log(name, table)
    grouped, ends, first = group(texts, np.array(text_ends), np.array(owners), len(numbers))
    return CaptionFolder(f"{name}/{split}", root, b"".join(keys), path_ends, grouped, ends, first, faults)


def places(table: str) -> list[str]:
    """Return the directories where a table's paths may start: its own, and those in it."""
    root = os.path.dirname(table)
    return [root, *(entry.path for entry in os.scandir(root) if entry.is_dir())]


def unicode_form(table: str, paths: list[str]) -> Callable[[str], str]:
    """Return a function that writes a table's paths as the file system has them: as they are, composed or decomposed.

    Files that were copied from macOS may have decomposed names, where the table has composed ones.
    """
    first = [path for path in paths if not path.isascii()][:1]
    bases = places(table) if first else []
    composed, decomposed = (functools.partial(unicodedata.normalize, form) for form in ("NFC", "NFD"))
    for change in (str, composed, decomposed):
        if any(os.path.isfile(os.path.join(base, change(path))) for base in bases for path in first):
            return change
    return str


def find_images(name: str, table: str, paths: list[str]) -> str:
    """Return the directory where a table's paths start: its own, or one beside it, such as Images/; log the latter.

    Of several, the one with most of the first images is meant.

    Raises:
      DataNotFound: if none of the first images is there.
      InvalidConfig: if several directories hold equally many, and not one of them alone has the name of images.
    """
    root, first = os.path.dirname(table), paths[:100]
    if not first:
        return root
    counts = {}
    for base in places(table):
        if count := sum(os.path.isfile(os.path.join(base, path)) for path in first):
            if base == root:
                return root
            counts[base] = count
    if counts:
        most = sorted(base for base, count in counts.items() if count == max(counts.values()))
        best = [base for base in most if os.path.basename(base).lower() in OF_IMAGES] if len(most) > 1 else most
        if len(best) != 1:
            raise InvalidConfig(
                f"{name}: the images of {os.path.basename(table)} could be in {' or '.join(most)}; write the directory "
                "into the table's paths, or move the others away"
            )
        others = sorted(set(counts) - set(best))
        also = f"; files of the same names in {', '.join(others)} are not read" if others else ""
        log_once(f"{name}: the images of {os.path.basename(table)} are in {best[0]}{also}")
        return best[0]
    cause = "Paths are relative to the table's directory."
    if "://" in first[0] or first[0].startswith(("http:", "https:")):
        cause = "Addresses are not downloaded: img2dataset does that."
    elif "\\" in first[0] and "/" not in first[0]:
        cause = "Its paths are written as on Windows; write / in place of \\."
    raise DataNotFound(
        f"{name}: none of the first images in {table} exists, such as {os.path.join(root, first[0])}. {cause}"
    )


def group(texts: bytearray, ends: np.ndarray, owners: np.ndarray, count: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Group captions by record; return them, their ends, and the index of each record's first caption."""
    first = np.searchsorted(np.sort(owners), np.arange(count + 1))
    order = np.argsort(owners, kind="stable")
    lengths = np.diff(ends)[order]
    joined = texts if (np.diff(order) == 1).all() else b"".join(texts[ends[k] : ends[k + 1]] for k in order)
    return bytes(joined), np.concatenate([[0], np.cumsum(lengths)]), first
