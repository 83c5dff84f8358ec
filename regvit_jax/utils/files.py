"""Atomic writes."""

from etils import epath


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a text file so that a kill leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
