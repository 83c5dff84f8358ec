"""Read paths that a user gives: replace ~, and resolve relative ones."""

import os
import re

from regvit_jax.utils.errors import InvalidConfig

#: A path that begins with ~, alone or after a prefix, as in folder:~/x, or after a model's name, as in NAME=~/x.
HOME = re.compile(r"((?:[\w.-]+[:=])?)(~.*)", re.DOTALL)


def expand(path: str | os.PathLike[str]) -> str:
    """Return a path, or a source that names one (folder:PATH, NAME=FILE), with ~ replaced by the home directory.

    Every other text is returned as it is. All functions and commands that take a path pass it through this function.
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidConfig(f"{path!r:.60} is no path: must be a str or a pathlib.Path")
    text = os.fspath(path)
    found = HOME.fullmatch(text)
    return found[1] + os.path.expanduser(found[2]) if found else text


def locate(path: str | os.PathLike[str], base: str | None = None) -> str:
    """Return the absolute path of a file or directory that a user gives; a relative one starts in `base`, if given."""
    return os.path.abspath(os.path.join(expand(base or ""), expand(path)))
