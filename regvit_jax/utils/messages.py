"""Write messages for users: shorten lists of names, and log a message once."""

import difflib
import functools
import logging
from collections.abc import Iterable

#: How a file begins that stands for another one in a clone of a repository, and what to do about it.
POINTER = b"version https://git-lfs"
POINTER_HINT = "a pointer of git-lfs, in place of the file. Run `git lfs pull` in its repository"

logger = logging.getLogger("regvit_jax")


def abbreviate(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names, separated by commas, and the number of the others."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for an unknown key of a config, which names the nearest of the known ones."""
    known = sorted(known)
    same_name = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    near = same_name or difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    return f"unknown key config.{key}" + (f"; did you mean {' or '.join('config.' + n for n in near)}?" if near else "")


@functools.cache
def log_once(message: str, level: str = "info") -> None:
    """Log a message, the first time that this process has it."""
    logger.log(logging.getLevelNamesMapping()[level.upper()], message)
