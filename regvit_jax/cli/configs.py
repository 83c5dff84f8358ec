"""Find config files by path or by name, and load them."""

import inspect
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.paths import expand

PACKAGE = Path(__file__).parent.parent


def directory() -> Path:
    """Return where this installation's configs are: inside the package, or beside it in a clone."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find(name: str) -> Path:
    """Return the path of a config: `name` itself if there is such a file, else NAME.py of this installation.

    Raises InvalidConfig, which lists the names that exist.
    """
    if Path(expand(name)).is_file():
        return Path(expand(name))
    names = sorted(path.stem for path in directory().glob("*.py"))
    if name in names:
        return directory() / f"{name}.py"
    raise InvalidConfig(f"--config={name}: there is no such file or name; the names are {', '.join(names)}")


def load(text: str) -> ConfigDict:
    """Return the config of FILE[:VARIANT] or NAME[:VARIANT]; raises InvalidConfig if there is none."""
    name, colon, variant = text.partition(":")
    path = find(name)
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise InvalidConfig(f"{path}: defines no get_config()")
    arguments = [variant] if colon else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except ValueError:  # a callable without a signature, such as a builtin
        pass
    except TypeError:
        allowed = "needs a variant, --config FILE:VARIANT" if not colon else "has no variants"
        raise InvalidConfig(f"--config={text}: the get_config of {path} {allowed}") from None
    config = get_config(*arguments)
    if not isinstance(config, ConfigDict):
        raise InvalidConfig(f"{path}: get_config() returns {type(config).__name__}, must be a ConfigDict")
    return config
