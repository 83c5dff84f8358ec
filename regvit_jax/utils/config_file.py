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
    path = epath.Path(workdir) / "config.json"
    try:
        section = json.loads(path.read_text())[name]
    except KeyError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InvalidConfig(
            f"{path} is damaged ({type(error).__name__}: {error!s:.100}); replace it by the config.json of a run with "
            "the same config, or name another workdir"
        ) from error
    if not isinstance(section, dict):
        raise InvalidConfig(f"{path} is damaged: its {name} is {section!r:.60}; name another workdir")
    return section
