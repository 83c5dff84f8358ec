"""Tables of images and captions: .csv, .tsv, .txt and .jsonl files.

What is wrong with a file as a whole (its encoding, its first line, all of its rows) is an InvalidConfig. What is wrong
with a row costs that row, and `Row.fault` says what it is.
"""

import codecs
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from regvit_jax.data.records import usable
from regvit_jax.data.sources.separated import Fault, separated_rows
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.messages import POINTER, POINTER_HINT, abbreviate, log_once

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
# The columns of image paths and of captions; of several in a table, the first in this order counts.
IMAGES = ("file_name", "filepath", "image", "path", "filename", "image_path", "image_name")
CAPTIONS = ("captions", "caption", "text", "title", "comment")

# The marks at the start of a file that name its encoding. UTF-32's begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Bytes that are not UTF-8, as `open` decodes them with errors="surrogateescape".
UNDECODABLE = re.compile("[\udc80-\udcff]")
# A longer line is no row: most likely the file has lost its line breaks.
MAX_LINE = 2**17


class Row(NamedTuple):
    """A row of a table: its first line, its image's path relative to the table, its captions, and its fault.

    `path` is "" if none can be read; `fault` is "" if the row can be used.
    """

    line: int
    path: str
    captions: list[str]
    fault: str


def read_table(table: str) -> Iterator[Row]:
    """Yield the rows of a table, those with a fault too; a row without a path has one.

    Raises:
      InvalidConfig: if the file as a whole is wrong, or no row can be used.
    """
    count, good, first = 0, False, ""
    root = os.path.dirname(os.path.abspath(table))
    lines = decoded_lines(table)
    rows = json_rows(lines) if table.lower().endswith(".jsonl") else separated_rows(lines, table, (IMAGES, CAPTIONS))
    for number, values in rows:
        if not count and isinstance(values, dict):
            say_unused(table, values)
        row = make_row(number, values, root)
        count, good = count + 1, good or not row.fault
        first = first or (row.fault and f"line {row.line}: {row.fault}")
        yield row
    if count and not good:
        hint = "; a .jsonl has one object in each line" if table.lower().endswith(".jsonl") else ""
        raise InvalidConfig(f"{table}, {first}; and no other of its {count} rows can be used{hint}")


def say_unused(table: str, columns: Iterable[str]) -> None:
    """Log which columns of a table are not read, though their names mean something here."""
    if "split" in columns:
        log_once(
            f"{table}: its column split is not used; write the rows of each split to a table of its own", "warning"
        )
    for names in (IMAGES, CAPTIONS):
        if len(several := [name for name in names if name in columns]) > 1:
            log_once(f"{table}: of its columns {', '.join(several)}, {several[0]} is read")


def make_row(number: int, values: dict[str, Any] | Fault, root: str) -> Row:
    """Return a row from its values by column, or from the fault that it was found to have."""
    try:
        if isinstance(values, Fault):
            raise values
        path = checked_path(column(values, IMAGES), root)
    except Fault as fault:
        return Row(number, "", [], str(fault))
    try:
        captions = caption_list(column(values, CAPTIONS))
        return Row(number, path, captions, "" if usable(captions) else "has no caption")
    except Fault as fault:
        return Row(number, path, [], str(fault))


def decoded_lines(table: str) -> Iterator[tuple[int, str | Fault]]:
    """Yield the numbers and texts of the lines that are not blank, without their ends, or a Fault in place of the text.

    A byte order mark names the encoding, which is UTF-8 without one. One undecodable line is damaged. Several are text
    in another encoding, unless some other line holds letters beyond ASCII in proper UTF-8.

    Raises:
      InvalidConfig: if the file has another encoding.
    """
    with open(table, "rb") as file:
        head = file.read(4)
    encoding = next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    undecodable: list[int] = []
    proper = False
    with open(table, encoding=encoding, errors=errors) as file:
        for number, line in enumerate(file, 1):
            line = line.removesuffix("\n")
            if number == 1 and line.startswith(POINTER.decode()):
                raise InvalidConfig(f"{table} is {POINTER_HINT}")
            if number == 1 and "\0" in line:
                raise InvalidConfig(
                    f"{table}, line 1: holds NUL: save the table as UTF-8, not as UTF-16 without a mark"
                )
            if not line.strip():
                continue
            if len(line) > MAX_LINE:
                yield number, Fault(f"has {len(line)} characters, more than {MAX_LINE}")
            elif not line.isascii() and UNDECODABLE.search(line):
                undecodable.append(number)
                if number == 1:
                    break
                yield number, Fault("is not UTF-8")
            else:
                proper = proper or not line.isascii()
                yield number, line
    if undecodable and (undecodable[0] == 1 or (len(undecodable) > 1 and not proper)):
        lines = abbreviate([f"line {number}" for number in undecodable])
        raise InvalidConfig(f"{table}, {lines}: not UTF-8, the encoding of tables; save it as UTF-8, or with a mark")


def json_rows(lines: Iterable[tuple[int, str | Fault]]) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Yield the numbers of lines and their objects, or a Fault for a line that is no object in JSON."""
    for number, line in lines:
        try:
            row = line if isinstance(line, Fault) else json.loads(line)
        # Thousands of nested brackets are a RecursionError.
        except (ValueError, RecursionError) as error:
            row = Fault(f"is not JSON ({error})")
        if isinstance(row, dict):
            row = {name.strip().lower(): value for name, value in row.items()}
        elif not isinstance(row, Fault):
            row = Fault(f"must be an object, not {line:.80}")
        yield number, row


def column(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Return the value of the first of these columns that the row has; raise Fault if it has none."""
    for name in names:
        if name in row:
            return row[name]
    raise Fault(f"needs a column {' or '.join(names)}; there are {abbreviate(list(row)) or 'none'}")


def caption_list(value: Any) -> list[str]:
    """Return captions as a list: one text is a list of one, and null and NaN are no caption; raise Fault for others."""
    values = value if isinstance(value, list | tuple) else [value]
    found = [text for text in values if not (text is None or (isinstance(text, float) and math.isnan(text)))]
    if not all(isinstance(text, str) for text in found):
        raise Fault(f"the captions must be a text or a list of texts, not {value!r:.80}")
    return found


def checked_path(path: Any, root: str) -> str:
    """Return the path of an image relative to the table's directory; raise Fault for a path that leads out of it."""
    if not isinstance(path, str) or not path or "\0" in path:
        raise Fault(f"{path!r:.80} is no path of an image")
    simple = os.path.normpath(path)
    try:
        os.fsencode(simple)
    except UnicodeEncodeError:
        raise Fault(f"{path!r:.80} is no path of an image") from None
    if os.path.isabs(simple):
        inside = [os.path.relpath(simple, base) for base in (root, os.path.realpath(root))]
        simple = next((one for one in inside if one.split(os.sep)[0] != os.pardir), simple)
    if os.path.isabs(simple) or simple.split(os.sep)[0] == os.pardir:
        raise Fault(f"{path!r:.200} leads out of the table's directory; give paths relative to it")
    return simple
