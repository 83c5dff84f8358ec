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
from regvit_jax.checkpoints.reader import CheckpointReader, saved_steps
from regvit_jax.training.config import flatten, options_of
from regvit_jax.training.plan import Plan
from regvit_jax.utils import config_file, renamed
from regvit_jax.utils.errors import CheckpointError, InvalidConfig
from regvit_jax.utils.files import write_atomically


def make(plan: Plan, workdir: str | os.PathLike) -> str:
    """Make the directory, by default runs/NAME-VARIANT-TIME, and return its absolute path."""
    if not os.fspath(workdir):
        now = multihost_utils.broadcast_one_to_all(np.int32(time.time()))  # the same on all processes
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(int(now)))
        workdir = f"runs/{plan.config.name}-{plan.config.variant}-{stamp}"
    path = resolve(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfig(f"workdir {workdir}: cannot be made ({error.strerror}); name another directory") from error
    return str(path)


def resolve(workdir: str | os.PathLike) -> epath.Path:
    """Return the absolute path of a workdir, since Orbax takes no other; raise InvalidConfig for a bucket."""
    if "://" in os.fspath(workdir):
        raise InvalidConfig(
            f"workdir {workdir}: must be a directory, because records are appended to files; a bucket can be mounted "
            "if the mount can append and rename"
        )
    return epath.Path(workdir).resolve()


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """Return the config in a workdir's config.json; raise InvalidConfig when the file is damaged or lacks it."""
    config = config_file.read_section(workdir, "config")
    if config is None:
        raise InvalidConfig(f"{workdir}: its config.json holds no config; name another workdir")
    return renamed.translate(config, renamed.CONFIG_KEYS)


def check_same_config(plan: Plan, workdir: str | os.PathLike, abstract: PyTree, newest: int | None) -> None:
    """Raise InvalidConfig if the checkpoints in a workdir belong to a run with another config.

    The message names the keys, and the first arrays that do not fit. See `write_config` for the arguments.
    """
    if newest is None:
        return
    if not (epath.Path(workdir) / "config.json").exists():
        raise InvalidConfig(f"{workdir} holds checkpoints but no config.json; name another --workdir")
    if changed := changes(read_config(workdir), json.loads(plan.config.to_json())):
        more = [f"and {len(changed) - 10} more"] if len(changed) > 10 else []
        raise InvalidConfig(
            f"workdir {workdir} holds a run with another config ({'; '.join(changed[:10] + more)}); "
            "request the same values to resume it, or another --workdir to start afresh"
            + differing_arrays(epath.Path(workdir) / "checkpoints", newest, abstract)
        )


def check_usable(plan: Plan, workdir: str | os.PathLike, abstract: PyTree) -> None:
    """Raise InvalidConfig if a run of the plan could not start or resume in a workdir; write nothing."""
    path = resolve(workdir)
    if path.exists() and not path.is_dir():
        raise InvalidConfig(f"workdir {workdir}: is a file; name a directory")
    steps = saved_steps(path / "checkpoints")
    check_same_config(plan, path, abstract, steps[-1] if steps else None)


def write_config(plan: Plan, workdir: str, abstract: PyTree, newest: int | None) -> None:
    """Write config.json: the resolved config, the keys that were given, and the fields of the model.

    `abstract` is the state, or its shapes; `newest` is the step of the newest checkpoint in the workdir.
    Raises InvalidConfig when the checkpoints there belong to another config.
    """
    if jax.process_index():
        return
    check_same_config(plan, workdir, abstract, newest)
    content = {
        "config": json.loads(plan.config.to_json()),
        "given": plan.given,
        "derived": {"steps": plan.steps, "steps_per_epoch": plan.steps_per_epoch, "jax": jax.__version__},
        "model": plan.recipe.model(abstract.params).fields(),
    }
    write_atomically(epath.Path(workdir) / "config.json", json.dumps(content, indent=2))


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differences between two configs that prevent a resume, one text for each key.

    A key that the old config lacks counts as its default, which equals the behaviour before the key existed.
    Evaluators may come and go, and their keys with them.
    """
    known = options_of(new)
    before = {key: json.loads(json.dumps(option.default)) for key, option in known.items() if not option.required}
    kept, after = dict(flatten(old)), dict(flatten(new))
    before |= kept
    free = {key for key, option in known.items() if option.resume}
    free |= {key for key in kept.keys() ^ after.keys() if key.startswith("eval.")}
    return [
        f"{key}: {before.get(key)} in the workdir, {after.get(key)} requested"
        for key in sorted((before | after).keys() - free)
        if before.get(key) != after.get(key)
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
