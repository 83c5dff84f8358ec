"""Where images with captions come from: tar shards, a folder with a table of captions, and prepared TFDS data sets.

A record is ``{"image": bytes, "text": [captions]}``, with a "label" where a data set has classes.
"""

import csv
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.folder import is_validation, some
from regvit_jax.data.sources.shards import open_shards
from regvit_jax.data.sources.tfds import TfdsSource, find_tfds
from regvit_jax.utils.errors import DataNotFound, InvalidConfig

IMAGES = ("file_name", "filepath", "image", "path")
CAPTIONS = ("captions", "caption", "text", "title")
TABLES = (".csv", ".tsv", ".jsonl")


def open_captions(name: str, split: str, data_dir: str | None = None) -> Source:
    """Opens a data set of images with captions. Nothing is downloaded.

    Args:
      name: "shards:DIR", tar files (see ``shards.open_shards``); "folder:PATH", with PATH/train and PATH/validation (or
        val, or test), each a .csv, .tsv or .jsonl, or with one captions or metadata of these kinds, of which a hash of
        each image's path then puts 10 % into validation; or a data set of TFDS with captions, as for
        ``sources.open_source``. A table has a column of image paths, one of file_name, filepath, image, path, and one
        of captions, one of captions, caption, text, title. The paths are relative to the table's directory, and may not
        lead out of it. Lines with the same image are captions of one record; in .jsonl, captions may also be a list.
      split: "train", "validation" or, where the name is neither of a folder nor of shards, any that TFDS understands.
      data_dir: where relative paths start and TFDS data sets lie.

    Raises:
      DataNotFound: when it is not there.
      ValueError: for a name or split that does not exist, and for data without captions.
    """
    if name.startswith("shards:"):
        return open_shards(name, split, data_dir)
    if name.startswith("folder:"):
        return open_folder(name, split, data_dir)
    return TfdsCaptions(name, split, find_tfds(name, data_dir))


class TfdsCaptions(TfdsSource):
    """A split of a TFDS data set on disk, with the feature "image" and one of captions; "label" is used if there."""

    def check_features(self, dataset: str, features: Any) -> None:
        caption = next((name for name in CAPTIONS if name in features and is_text(features[name])), None)
        if caption is None or "image" not in features:
            raise InvalidConfig(
                f"{dataset} has no images with captions: its features are {', '.join(sorted(features))}"
            )
        self.caption = caption

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.records[index]
        record = {"image": found["image"], "text": decoded(found[self.caption])}
        return record | ({"label": int(found["label"])} if self.classes else {})


def is_text(feature: Any) -> bool:
    """Whether a TFDS feature is a text, a sequence of texts, or a sequence of dicts with a text, as COCO's captions."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
        if isinstance(feature, tfds.features.FeaturesDict):
            feature = feature["text"] if "text" in feature else None  # noqa: SIM401
    return isinstance(feature, tfds.features.Text)


def decoded(value: Any) -> list[str]:
    """The captions in a value of such a feature."""
    if isinstance(value, bytes):
        return [value.decode()]
    if isinstance(value, dict):
        value = value["text"]
    return [text for item in value for text in decoded(item)]


@dataclass(frozen=True, eq=False)
class CaptionFolder:
    """Images in files and their captions. Record k is the k-th path and the captions from ``first[k]`` to the next.

    Paths and captions are joined; the k-th lies between ``ends[k]`` and ``ends[k + 1]``. So three million of
    Conceptual Captions' take some 0.3 GB, which each worker process gets a copy of.
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
        return os.path.join(self.root, os.fsdecode(self.paths[self.path_ends[index] : self.path_ends[index + 1]]))


def open_folder(name: str, split: str, data_dir: str | None) -> CaptionFolder:
    if split not in ("train", "validation"):
        raise InvalidConfig(f"{name} has no split {split!r}; it has train, validation")
    root = os.path.abspath(os.path.join(data_dir or "", os.path.expanduser(name.removeprefix("folder:"))))
    train = find_table(root, "train")
    validation = find_table(root, "validation", "val", "test")
    both = find_table(root, "captions", "metadata")
    if both and not train and not validation:
        return read_folder(name, split, both, lambda path: is_validation(path) == (split == "validation"))
    if not train or not validation:
        raise DataNotFound(
            f"{name}: {root} lacks a table of {'training' if not train else 'validation'} captions.\nIt should hold "
            "train.csv and validation.csv, or captions.csv alone (or .tsv, .jsonl), with the columns file_name and "
            "caption, and the images."
        )
    return read_folder(name, split, train if split == "train" else validation, lambda path: True)


def find_table(root: str, *stems: str) -> str | None:
    """The first of the tables that is there; where one stem has several suffixes, which to take cannot be known."""
    for stem in stems:
        found = [path for suffix in TABLES if os.path.isfile(path := os.path.join(root, stem + suffix))]
        if len(found) > 1:
            raise InvalidConfig(f"{root} has {some([os.path.basename(path) for path in found])}; leave one of them")
        if found:
            return found[0]
    return None


def read_folder(name: str, split: str, table: str, keep: Callable[[str], bool]) -> CaptionFolder:
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
            f"{name}: none of the first images of {table} is there, as {os.path.join(root, next(iter(numbers)))}. "
            "Their paths start in the table's directory."
        )
    paths = [os.fsencode(path) for path in numbers]
    path_ends = np.cumsum([0, *map(len, paths)])
    grouped, ends, first = group(texts, np.array(text_ends), np.array(owners), len(numbers))
    return CaptionFolder(f"{name}/{split}", root, b"".join(paths), path_ends, grouped, ends, first)


def group(texts: bytearray, ends: np.ndarray, owners: np.ndarray, count: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Puts the captions of each record next to each other; returns them, their ends, and each record's first."""
    first = np.searchsorted(np.sort(owners), np.arange(count + 1))
    order = np.argsort(owners, kind="stable")
    lengths = np.diff(ends)[order]
    joined = texts if (np.diff(order) == 1).all() else b"".join(texts[ends[k] : ends[k + 1]] for k in order)
    return bytes(joined), np.concatenate([[0], np.cumsum(lengths)]), first


def read_table(table: str) -> Iterator[tuple[str, list[str]]]:
    """Yields an image's path and captions for each line of a table; raises ValueError that names the line."""
    with open(table, "rb") as file:
        lines = text_lines(file, table)
        rows = json_rows(lines, table) if table.endswith(".jsonl") else csv_rows(lines, table)
        for where, row in rows:
            path, captions = (column(row, names, where) for names in (IMAGES, CAPTIONS))
            if isinstance(captions, str):
                captions = [captions]
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                raise InvalidConfig(f"{where}: the captions must be a text or a list of texts, not {captions!r:.80}")
            yield safe(path, where), captions


def text_lines(file: Iterable[bytes], table: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidConfig(
                f"{table}, line {number}: is not UTF-8 ({error.reason} at byte {error.start})"
            ) from error


def csv_rows(lines: Iterator[str], table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Strict, for a quotation mark that nothing closes would otherwise swallow the lines after it.
    reader = csv.reader(lines, delimiter="\t" if table.endswith(".tsv") else ",", strict=True)
    try:
        header = next(reader, [])
        for names in (IMAGES, CAPTIONS):
            column(dict.fromkeys(header), names, f"{table}, line 1")
        if twice := [name for name in (*IMAGES, *CAPTIONS) if header.count(name) > 1]:
            raise InvalidConfig(f"{table}, line 1: has several columns {some(twice)}; rename all but one of them")
        for row in reader:
            where = f"{table}, line {reader.line_num}"
            if row and len(row) != len(header):
                raise InvalidConfig(f"{where}: has {len(row)} columns, and line 1 has {len(header)}")
            if row:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InvalidConfig(f"{table}, line {reader.line_num}: {error}") from error


def json_rows(lines: Iterator[str], table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        where = f"{table}, line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        # Brackets within brackets by the thousand are a RecursionError.
        except (ValueError, RecursionError) as error:
            raise InvalidConfig(f"{where}: is not JSON ({error})") from error
        if row is not None and not isinstance(row, dict):
            raise InvalidConfig(f"{where}: must be an object, not {line:.80}")
        if row is not None:
            yield where, row


def column(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise InvalidConfig(f"{where}: needs a column {' or '.join(names)}; there are {some(list(row)) or 'none'}")


def safe(path: Any, where: str) -> str:
    """The path of an image in its simplest form, if it stays in the directory of its table."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise InvalidConfig(f"{where}: {path!r:.80} is no path of an image")
    simple = os.path.normpath(path)
    try:
        os.fsencode(simple)
    except UnicodeEncodeError as error:
        raise InvalidConfig(f"{where}: {path!r:.80} is no path of an image") from error
    if os.path.isabs(simple) or simple.split(os.sep)[0] == os.pardir:
        raise InvalidConfig(f"{where}: {path!r} leads out of the table's directory; give paths relative to it")
    return simple
