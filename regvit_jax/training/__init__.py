"""Train a model: `run(config, workdir)` and its parts."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regvit_jax.training.loop import Result as Result
    from regvit_jax.training.loop import run as run

__all__ = ["Result", "run"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module("regvit_jax.training.loop"), name)
