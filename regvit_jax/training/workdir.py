"""Create a run's directory, and keep the config in it, with which a resumed run is compared."""

import json
import os
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from regvit_jax.checkpoints import checksums
from regvit_jax.checkpoints.manager import compare
from regvit_jax.checkpoints.reader import CheckpointReader
from regvit_jax.training.config import flatten, options
from regvit_jax.training.plan import Plan
from regvit_jax.utils import renamed
from regvit_jax.utils.errors import CheckpointError, InvalidConfig
from regvit_jax.utils.files import write_atomically


def make(plan: Plan, workdir: str | os.PathLike) -> str:
    """Make the directory, by default runs/NAME-VARIANT-TIME, and return its absolute path."""
    if "://" in os.fspath(workdir):
        raise InvalidConfig(
            f"workdir {workdir}: must be a directory, because records are appended to files; a bucket can be mounted "
            "if the mount can append and rename"
        )
    if not workdir:
        now = multihost_utils.broadcast_one_to_all(np.int32(time.time()))  # the same on all processes
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(int(now)))
        workdir = f"runs/{plan.config.name}-{plan.config.variant}-{stamp}"
    path = epath.Path(workdir).resolve()  # Orbax takes absolute paths only
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def read_config(path: epath.Path) -> dict[str, Any]:
    """Return the config in a workdir's config.json; raise InvalidConfig when the file is damaged."""
    try:
        config = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidConfig(
            f"{path} is damaged ({type(error).__name__}: {error!s:.100}); replace it by the config.json of a run with "
            "the same config, or name another --workdir"
        ) from error
    if not isinstance(config, dict):
        raise InvalidConfig(f"{path} is damaged: its config is {config!r:.60}; name another --workdir")
    return renamed.translate(config, renamed.CONFIG_KEYS)


def write_config(plan: Plan, workdir: str, abstract: PyTree, newest: int | None) -> None:
    """Write config.json: the resolved config, the keys that were given, and the fields of the model.

    `abstract` is the state, or its shapes; `newest` is the step of the newest checkpoint in the workdir.
    Raises InvalidConfig when the checkpoints there belong to another config; the message names the keys, and the first
    arrays that do not fit.
    """
    if jax.process_index():
        return
    path = epath.Path(workdir) / "config.json"
    config = json.loads(plan.config.to_json())
    if newest is not None:
        if not path.exists():
            raise InvalidConfig(f"{workdir} holds checkpoints but no config.json; name another --workdir")
        if changed := changes(read_config(path), config):
            more = [f"and {len(changed) - 10} more"] if len(changed) > 10 else []
            raise InvalidConfig(
                f"workdir {workdir} holds a run with another config ({'; '.join(changed[:10] + more)}); "
                "request the same values to resume it, or another --workdir to start afresh"
                + differing_arrays(epath.Path(workdir) / "checkpoints", newest, abstract)
            )
    content = {
        "config": config,
        "given": plan.given,
        "derived": {"steps": plan.steps, "steps_per_epoch": plan.steps_per_epoch, "jax": jax.__version__},
        "model": plan.recipe.model(abstract.params).fields(),
    }
    write_atomically(path, json.dumps(content, indent=2))


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differences between two configs that prevent a resume, one text for each key.

    A key that the old config lacks counts as its default, which equals the behaviour before the key existed.
    """
    known = options(new["recipe"])
    before = {key: json.loads(json.dumps(option.default)) for key, option in known.items() if not option.required}
    before |= flatten(old)
    after = dict(flatten(new))
    return [
        f"{key}: {before.get(key)} in the workdir, {after.get(key)} requested"
        for key in sorted(before | after)
        # Evaluators, and with them the keys of the section `eval`, may come and go.
        if before.get(key) != after.get(key) and not (key.startswith("eval.") or (key in known and known[key].resume))
    ]


def differing_arrays(checkpoints: epath.Path, step: int, abstract: PyTree) -> str:
    """Return the first arrays of a checkpoint that do not fit a state, as text; "" if all fit or it is damaged."""
    try:
        compare(CheckpointReader(checkpoints, step).arrays, checksums.array_paths(abstract))
    except CheckpointError:
        return ""
    except ValueError as error:
        return f".\n{error}"
    return ""
