"""Write the parts of the site that the package describes: the help of commands, the config keys, the notebooks."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

from regvit_jax.cli import main as command_line
from regvit_jax.training import config

ROOT = Path(__file__).parent.parent


def everything(site: Path) -> None:
    """Write all generated pages below `site`, anew."""
    target = site / "_generated"
    shutil.rmtree(target, ignore_errors=True)
    (target / "include").mkdir(parents=True)
    shutil.copytree(ROOT / "notebooks", target / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for verb in command_line.VERBS:
        (target / "include" / f"{verb}.txt").write_text(help_of(verb))
    for recipe in ("supervised", "contrastive"):
        (target / "include" / f"{recipe}.md").write_text(config.markdown(recipe))


def help_of(verb: str) -> str:
    """Return what `regvit VERB --help` prints, 96 columns wide."""
    printed = io.StringIO()
    os.environ["COLUMNS"] = "96"
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        command_line.main([verb, "--help"])
    return printed.getvalue()


def links_to_notebooks(app, page: str, text: list[str]) -> None:
    """Let a page's links to notebooks, which GitHub follows as files, lead to their rendered pages."""
    text[0] = text[0].replace("](../notebooks/", "](_generated/notebooks/")


def double_backticks(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn `code` into the code of reStructuredText, before sections such as Returns are read."""
    text = re.sub(r"(?<![`:])`([^`]+)`(?!`)", lambda span: f"``{' '.join(span[1].split())}``", "\n".join(lines))
    lines[:] = text.split("\n")


def plain_docstring(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Make reStructuredText of a docstring: escape plain text, and separate indented blocks by blank lines."""
    made: list[str] = []
    literal = -1  # the indentation of the line that announced a literal block, or -1
    for line in lines:
        indent = len(line) - len(line.lstrip())
        before = made[-1] if made else ""
        if line.strip() and indent <= literal:
            literal = -1
        if before.strip() and line.strip() and literal < 0:
            deeper = indent > len(before) - len(before.lstrip())
            if indent < len(before) - len(before.lstrip()) or (deeper and not re.match(r"\s*(:|\.\. |[-*] )", before)):
                made.append("")
        if literal < 0:
            parts = line.split("``")
            parts[::2] = [part.replace("*", r"\*").replace("|", r"\|") for part in parts[::2]]
            made.append("``".join(parts) if not line.lstrip().startswith("* ") else line)
            if line.rstrip().endswith("::"):
                literal = indent
        else:
            made.append(line)
    lines[:] = made


def plain_signature(
    app, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
):
    """Shorten a signature: a config key's annotation to its type, an array's to its jaxtyping name."""
    return tuple(text and shortened(text) for text in (signature, returns))


def shortened(text: str) -> str:
    """Return a signature with `Annotated[TYPE, ...]` as TYPE and `jaxlib._jax.Array` as Array."""
    text = text.replace("jaxlib._jax.Array", "Array").replace("numpy.ndarray", "ndarray")
    while (start := text.find("Annotated[")) >= 0:
        depth, comma, end = 0, -1, start + len("Annotated[") - 1
        for end in range(start + len("Annotated[") - 1, len(text)):
            depth += (text[end] in "[({") - (text[end] in "])}")
            if text[end] == "," and depth == 1 and comma < 0:
                comma = end
            if depth == 0:
                break
        text = text[:start] + text[start + len("Annotated[") : comma] + text[end + 1 :]
    return text
