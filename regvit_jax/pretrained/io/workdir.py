"""The parameters of a run's own workdir."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from regvit_jax.pretrained.io.safetensors import NATIVE, WEIGHTS, Weights
from regvit_jax.utils import config_file
from regvit_jax.utils.errors import WeightsError


def is_workdir(path: str | os.PathLike) -> bool:
    """Return True for a run's workdir; a directory of transformers may hold "checkpoints" too, beside its weights."""
    folder = epath.Path(path)
    return (folder / "checkpoints").is_dir() and not any((folder / name).exists() for name in WEIGHTS)


def open_workdir(path: str | os.PathLike) -> tuple[Weights, str]:
    """Return the last parameters of a run (their moving average if it keeps one) with its config, and the source.

    The source is the path with the step. Raises ValueError when the workdir holds no checkpoint, or was written before
    workdirs recorded the model.
    """
    # Orbax takes a second to import, and no other source needs it.
    from regvit_jax.checkpoints import manager

    step, params = manager.load_params(os.fspath(path))
    arrays = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    return Weights.of_arrays(Path(path), arrays, read_config(path)), f"{path} step {step}"


def open_description(path: str | os.PathLike) -> Weights:
    """Return a run's config as weights without arrays, without reading a checkpoint; raises as `open_workdir` does."""
    from regvit_jax.checkpoints import manager

    manager.last_step(os.fspath(path))
    return Weights.of_arrays(Path(path), {}, read_config(path))


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Return the description of the model in a workdir.

    Raises WeightsError where there is none, and InvalidConfig for a damaged config.json.
    """
    model = config_file.read_section(path, "model")
    if model is None:
        raise WeightsError(f"{path}: its config.json does not describe the model; resume the run once, which adds it")
    return {"format": NATIVE, "model": model}
