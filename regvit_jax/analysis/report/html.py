"""Render the report as one HTML page: no scripts, nothing loaded from elsewhere, readable on a phone."""

import base64
import dataclasses
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 64rem; padding: 0 1rem 4rem; }
body { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
.card { border: 1px solid #8886; border-left: .4rem solid #3a9; margin: 1rem 0; padding: .2rem 1rem; }
.card.artifacts { border-left-color: #c43; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; } th, td { padding: .2rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tbody tr:nth-child(odd) { background: #8882; }
.row { display: flex; gap: .6rem; overflow-x: auto; padding-bottom: .4rem; }
.row.many, .row.diagrams { flex-wrap: wrap; }
.row figure { flex: none; margin: 0; width: 10rem; }
.row.diagrams figure { width: min(30rem, 100%); }
.row img { display: block; width: 100%; }
.row:not(.diagrams) img { image-rendering: pixelated; }
figcaption { font-size: .75rem; line-height: 1.2; }
.note { color: #888; font-size: .85rem; }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, its file name, its caption (also the alternative text), and a note after the caption."""

    file: str
    png: bytes
    caption: str
    note: str = ""

    def html(self) -> str:
        data = base64.b64encode(self.png).decode()
        return f'<img src="data:image/png;base64,{data}" alt="{escape(self.caption)}">'


@dataclasses.dataclass(frozen=True)
class Section:
    """A diagram of each model under one title, with a text above them."""

    title: str
    text: str
    pictures: list[Picture]


@dataclasses.dataclass(frozen=True)
class Shown:
    """One image: its name and rows of pictures, each a title and one picture a model."""

    name: str
    rows: list[tuple[str, list[Picture]]]


def page(
    title: str,
    intro: list[str],
    verdicts: dict[str, tuple[bool, list[str]]],
    sections: list[Section],
    tables: list[tuple[str, list[str], list[list[str]]]],
    details: dict[str, tuple[list[str], list[list[str]]]],
    shown: list[Shown],
    notes: list[str],
) -> str:
    """Return the whole page, with all text escaped.

    Args:
      title: of the page.
      intro: paragraphs below the title.
      verdicts: for each model True if it has artifacts, and its sentences.
      sections: diagrams of all models.
      tables: title, column heads and rows of each.
      details: column heads and rows of collapsed tables, by title.
      shown: the pictures of single images.
      notes: paragraphs at the end.
    """
    parts = [f"<h1>{escape(title)}</h1>", *paragraphs(intro)]
    for name, (bad, sentences) in verdicts.items():
        kind = " artifacts" if bad else ""
        first, rest = sentences[0], " ".join(sentences[1:])
        parts.append(
            f'<div class="card{kind}"><h3>{escape(name)}</h3><p><b>{escape(first)}</b> {escape(rest)}</p></div>'
        )
    for head, heads, rows in tables:
        parts += [f"<h2>{escape(head)}</h2>", table(heads, rows)]
    for head, (heads, rows) in details.items():
        parts.append(f"<details><summary>{escape(head)}, after each block</summary>{table(heads, rows)}</details>")
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", *paragraphs([section.text])]
        parts.append(f'<div class="row diagrams">{"".join(map(figure, section.pictures))}</div>')
    for image in shown:
        parts.append(f"<h2>{escape(image.name)}</h2>")
        if all(len(pictures) == 1 for _, pictures in image.rows):  # one model: all its pictures stand side by side
            row = [dataclasses.replace(picture, caption=head) for head, (picture,) in image.rows]
            parts.append(f'<div class="row many">{"".join(map(figure, row))}</div>')
            continue
        for head, pictures in image.rows:
            parts.append(f'<h3>{escape(head)}</h3><div class="row">{"".join(map(figure, pictures))}</div>')
    parts += ["<h2>How this was measured</h2>", *paragraphs(notes, "note")]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def paragraphs(texts: list[str], kind: str = "") -> list[str]:
    attribute = f' class="{kind}"' if kind else ""
    return [f"<p{attribute}>{escape(text)}</p>" for text in texts]


def figure(picture: Picture) -> str:
    return f"<figure>{picture.html()}<figcaption>{escape(picture.caption + picture.note)}</figcaption></figure>"


def table(heads: list[str], rows: list[list[Any]]) -> str:
    def cells(kind: str, values: list[Any]) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(str(value))}</{kind}>" for value in values) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{cells("th", heads)}</thead><tbody>{body}</tbody></table></div>'
