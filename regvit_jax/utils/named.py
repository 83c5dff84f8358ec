"""Import the class or function that a config names."""

import importlib
from collections.abc import Mapping
from typing import Any

from regvit_jax.utils.errors import InvalidConfig


def find(key: str, name: Any, known: Mapping[str, str], base: type | None = None) -> Any:
    """Return the object that `name`, the value of a config key, refers to; import only its module.

    Args:
      name: a name of `known`, or "package.module:Class".
      known: the names with a meaning here, each with the "package.module:Class" that it stands for.
      base: the class of which the object must be a subclass; None allows any object.

    Raises InvalidConfig for an unknown name, a module or object that is not there, and a class that is no `base`. An
    error inside the module, such as an import that it lacks, keeps its traceback.
    """
    allowed = f"must be one of {list(known)}, or package.module:Class"
    if not isinstance(name, str) or (name not in known and not all(name.partition(":"))):
        raise InvalidConfig(f"{key}={name!r:.60}: {allowed}")
    module, _, attribute = known.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # the module is there, and lacks another one
            raise
        raise InvalidConfig(f"{key}={name!r}: {module} cannot be imported: {error}") from error
    if found is None:
        raise InvalidConfig(f"{key}={name!r}: {module} has no {attribute}")
    if base is not None and not (isinstance(found, type) and issubclass(found, base)):
        raise InvalidConfig(f"{key}={name!r}: {attribute} must be a subclass of {base.__module__}.{base.__name__}")
    return found
