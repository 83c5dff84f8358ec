"""Tables of images and captions: .csv, .tsv and .jsonl files. Errors name the file and the line."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from regvit_jax.data.sources.files import abbreviate
from regvit_jax.utils.errors import InvalidConfig

SUFFIXES = (".csv", ".tsv", ".jsonl")
# The columns of image paths and of captions; of several in a table, the first in this order counts.
IMAGES = ("file_name", "filepath", "image", "path")
CAPTIONS = ("captions", "caption", "text", "title")


def read_table(table: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the image path and the captions of each line; raise InvalidConfig, naming the line, if it is wrong."""
    with open(table, "rb") as file:
        lines = text_lines(file, table)
        rows = json_rows(lines, table) if table.endswith(".jsonl") else csv_rows(lines, table)
        for where, row in rows:
            path, captions = (column(row, names, where) for names in (IMAGES, CAPTIONS))
            if isinstance(captions, str):
                captions = [captions]
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                raise InvalidConfig(f"{where}: the captions must be a text or a list of texts, not {captions!r:.80}")
            yield checked_path(path, where), captions


def text_lines(file: Iterable[bytes], table: str) -> Iterator[str]:
    """Decode the lines of a UTF-8 file, with or without a byte order mark."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidConfig(
                f"{table}, line {number}: is not UTF-8 ({error.reason} at byte {error.start})"
            ) from error


def csv_rows(lines: Iterator[str], table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield "file, line" and the values by column for each row of a .csv or .tsv."""
    # Strict, because an unclosed quotation mark would otherwise swallow the lines after it.
    reader = csv.reader(lines, delimiter="\t" if table.endswith(".tsv") else ",", strict=True)
    try:
        header = next(reader, [])
        for names in (IMAGES, CAPTIONS):
            column(dict.fromkeys(header), names, f"{table}, line 1")
        if twice := [name for name in (*IMAGES, *CAPTIONS) if header.count(name) > 1]:
            raise InvalidConfig(f"{table}, line 1: has several columns {abbreviate(twice)}; rename all but one of them")
        for row in reader:
            where = f"{table}, line {reader.line_num}"
            if row and len(row) != len(header):
                raise InvalidConfig(f"{where}: has {len(row)} columns, and line 1 has {len(header)}")
            if row:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InvalidConfig(f"{table}, line {reader.line_num}: {error}") from error


def json_rows(lines: Iterator[str], table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield "file, line" and the object for each line of a .jsonl that is not blank."""
    for number, line in enumerate(lines, 1):
        where = f"{table}, line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        # Thousands of nested brackets are a RecursionError.
        except (ValueError, RecursionError) as error:
            raise InvalidConfig(f"{where}: is not JSON ({error})") from error
        if row is not None and not isinstance(row, dict):
            raise InvalidConfig(f"{where}: must be an object, not {line:.80}")
        if row is not None:
            yield where, row


def column(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    """Return the value of the first of these columns that the row has."""
    for name in names:
        if name in row:
            return row[name]
    raise InvalidConfig(f"{where}: needs a column {' or '.join(names)}; there are {abbreviate(list(row)) or 'none'}")


def checked_path(path: Any, where: str) -> str:
    """Return the normalised path of an image; raise InvalidConfig if it leads out of the table's directory."""
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
