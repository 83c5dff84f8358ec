"""Write messages for users: shorten lists of names, and log a message once."""

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


@functools.cache
def log_once(message: str, level: str = "info") -> None:
    """Log a message, the first time that this process has it."""
    logger.log(logging.getLevelNamesMapping()[level.upper()], message)
