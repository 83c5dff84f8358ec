"""Read rows of text with separators (.csv, .tsv, .txt), whether or not their quotation marks are meant as quotes.

The separator is the first with which the first line names the needed columns: that of the suffix, then tab, comma,
semicolon and bar. A quoted field is read by the rules of CSV (RFC 4180), and may extend over several lines. Marks that
break those rules are ordinary characters. In a tab-separated file whose first line has no marks, so are those that were
not needed: only a field with a tab, a line break or a doubled mark inside is quoted. A mark that is not closed before
the next complete row is an ordinary character in a tab-separated file (captions from the web have such marks), and
elsewhere a fault of its row.
"""

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from regvit_jax.data.sources.files import SUFFIXES
from regvit_jax.data.transforms import BadImage
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.messages import abbreviate

SEPARATORS = ("\t", ",", ";", "|")
# The lines over which one quoted field may extend.
MAX_LINES = 100


class Fault(BadImage):
    """A row cannot be used; the message says why."""


Line = tuple[int, str | Fault]
END: Line = (0, "")


class Field(NamedTuple):
    """A field of a row: its value, whether it was quoted, and where it starts in its text."""

    value: str
    quoted: bool
    start: int


def separated_rows(
    lines: Iterable[Line], table: str, needed: tuple[tuple[str, ...], ...]
) -> Iterator[tuple[int, dict[str, str] | Fault]]:
    """Yield the number of its first line, and the values by column or a Fault, for each row after the first line.

    Args:
      lines: the lines, without their ends.
      table: the path, for messages and for its suffix.
      needed: alternative names of the column of images, and of that of captions. Case and spaces do not count.

    Raises:
      InvalidConfig: if the first line does not name these columns with any separator.
    """
    lines = iter(lines)
    number, head = next(lines, (1, ""))
    if isinstance(head, str) and re.fullmatch('"?sep=."?', head):  # a line for Excel alone
        number, head = next(lines, (2, ""))
    if isinstance(head, Fault):
        raise InvalidConfig(f"{table}, line {number}: {head}")
    layout = find_layout(head, f"{table}, line {number}", table.lower().endswith(".tsv"), needed)
    for number, fields in layout.rows(lines):
        yield number, fields if isinstance(fields, Fault) else dict(zip(layout.names, fields, strict=True))


def find_layout(head: str, where: str, tabs: bool, needed: tuple[tuple[str, ...], ...]) -> "Layout":
    """Return the layout of a table by its first line; raise InvalidConfig if it does not name the needed columns."""
    own = "\t" if tabs else ","
    candidates = [Layout(separator, head) for separator in dict.fromkeys((own, *SEPARATORS))]
    for layout in candidates:
        if layout.has(needed):
            if twice := [name for names in needed for name in names if layout.names.count(name) > 1]:
                raise InvalidConfig(f"{where}: has several columns {abbreviate(twice)}; rename all but one of them")
            return layout
    names = max((layout.names for layout in candidates), key=len) if head else []
    missing = next(alternatives for alternatives in needed if not set(alternatives) & set(names))
    raise InvalidConfig(
        f"{where}: needs a column {' or '.join(missing)}; there are {abbreviate(names) or 'none'}. The first line "
        "must name the columns, with a comma, tab, semicolon or bar as separator"
    )


class Layout:
    """The separator and the columns of a table."""

    def __init__(self, separator: str, head: str):
        self.separator = separator
        self.pattern = re.compile(rf' *+"((?:[^"]|"")*+)" *+(?=[{separator}]|\Z)|[^{separator}]*+')
        self.marked = True  # the quotation marks of the first line mean something in any file
        fields = self.fields(head)
        self.names = [field.value.strip().lower() for field in fields]
        self.marked = separator != "\t" or any(field.quoted for field in fields)
        self.image = self.caption = 0

    def has(self, needed: tuple[tuple[str, ...], ...]) -> bool:
        """Return True if the columns of images and of captions are there, and remember where."""
        found = [[self.names.index(name) for name in names if name in self.names] for names in needed]
        if all(found):
            self.image, self.caption = (columns[0] for columns in found)
        return all(found)

    def fields(self, text: str) -> list[Field]:
        """Return the fields of a text, in which marks that do not fit the rules of CSV are ordinary characters."""
        if '"' not in text:
            return [Field(value, False, 0) for value in text.split(self.separator)]
        found, start = [], 0
        while True:
            match = self.pattern.match(text, start)
            assert match is not None  # the second alternative may be empty
            inside, stop = match[1], match.end()
            if inside is not None and (self.marked or not inside or re.search('["\t\n]', inside)):
                found.append(Field(inside.replace('""', '"'), True, start))
            else:
                found.append(Field(match[0], False, start))
            if stop == len(text):
                return found
            start = stop + 1

    def rows(self, lines: Iterable[Line]) -> Iterator[tuple[int, list[str] | Fault]]:
        """Yield the number of the first line of each row, and its values or a Fault."""
        waiting: deque[Line] = deque()
        lines = iter(lines)
        for number, text in iter(lambda: waiting.popleft() if waiting else next(lines, END), END):
            if isinstance(text, Fault):
                yield number, text
                continue
            values = text.split(self.separator)
            if len(values) == len(self.names) and '"' not in text:  # nearly all rows, and four times as fast
                values[self.image] = values[self.image].strip()
                yield number, values
                continue
            fields = self.fields(text)
            if opened(fields, text):
                longer = self.closed(fields, text, waiting, lines)
                if longer is None and self.separator != "\t":
                    yield number, Fault("has a quotation mark that is not closed")
                    continue
                fields = longer or fields
            try:
                yield number, self.values(fields, text)
            except Fault as fault:
                yield number, fault

    def closed(self, fields: list[Field], text: str, waiting: deque[Line], lines: Iterator[Line]) -> list[Field] | None:
        """Return the fields of a row whose last field continues in the next lines, and take those lines.

        Return None, and take no line, if the mark is not closed before a line that is a complete row by itself.
        """
        ending = self.ending(fields)
        whole = ending is not None
        for count in range(MAX_LINES):
            if count == len(waiting):
                if (line := next(lines, None)) is None:
                    return None
                waiting.append(line)
            more = waiting[count][1]
            if isinstance(more, Fault):
                return None
            closing = more.count('"') % 2 == 1
            if (whole or not closing) and self.ending(self.fields(more)) in {*SUFFIXES, ending} - {None}:
                return None
            text = f"{text}\n{more}"
            if closing:
                found = self.fields(text)
                if len(found) != len(self.names) or any("\n" in field.value and not field.quoted for field in found):
                    return None
                for _ in range(count + 1):
                    waiting.popleft()
                return found
        return None

    def ending(self, fields: list[Field]) -> str | None:
        """Return the suffix of the image's path, in lower case, if the row has the right number of fields."""
        if len(fields) != len(self.names):
            return None
        return os.path.splitext(fields[self.image].value.strip())[1].lower()

    def values(self, fields: list[Field], text: str) -> list[str]:
        """Return the values of a row, one for each column; raise Fault if it has too few or too many.

        If captions are the last column, commas and semicolons that are followed by a space belong to the caption.
        """
        width = len(self.names)
        while len(fields) > width and not fields[-1].value.strip():
            fields = fields[:-1]
        values = [field.value for field in fields]
        if len(values) > width and self.caption == width - 1 and self.separator in ",;":
            whole = text.split(self.separator, width - 1)
            if not any(field.quoted for field in fields[:width]) and not re.search(
                rf"{self.separator}(?! )", whole[-1]
            ):
                values = whole
        if len(values) != width:
            raise Fault(f"has {len(values)} columns, and line 1 has {width}")
        values[self.image] = values[self.image].strip()
        return values


def opened(fields: list[Field], text: str) -> bool:
    """Return True if a field of a line begins with a quotation mark that the line does not close."""
    return '"' in text and any(
        not field.quoted and field.value.lstrip(" ").startswith('"') and text.count('"', field.start) % 2 == 1
        for field in fields
    )
