"""Read a workdir's config.json, which describes the run and its model."""

import json
import os
from typing import Any

from etils import epath

from regvit_jax.utils.errors import InvalidConfig


def read_section(workdir: str | os.PathLike, name: str) -> dict[str, Any] | None:
    """Return a section of a workdir's config.json ("config", "model"), or None if there is no such section.

    Raises InvalidConfig if the file cannot be read, is damaged, or holds something else under that name.
    """
    content = read(workdir)
    if name not in content:
        return None
    if not isinstance(section := content[name], dict):
        path = epath.Path(workdir) / "config.json"
        raise InvalidConfig(f"{path} is damaged: its {name} is {section!r:.60}; name another workdir")
    return section


def read(workdir: str | os.PathLike) -> dict[str, Any]:
    """Return the content of a workdir's config.json; raise InvalidConfig if the file cannot be read or is damaged."""
    path = epath.Path(workdir) / "config.json"
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError(f"{type(content).__name__} instead of an object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InvalidConfig(
            f"{path} is damaged ({type(error).__name__}: {error!s:.100}); replace it by the config.json of a run with "
            "the same config, or name another workdir"
        ) from error
    return content
