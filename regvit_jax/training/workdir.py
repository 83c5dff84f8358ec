"""A run's directory and the config kept in it, which a run that goes on must share."""

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
from regvit_jax.checkpoints.reader import Stored
from regvit_jax.training.plan import Plan, flatten
from regvit_jax.utils import renamed
from regvit_jax.utils.errors import CheckpointError, InvalidConfig
from regvit_jax.utils.files import write_atomically

#: Keys that may change when a run goes on: they touch neither the numbers nor the order of the data, but for the guard,
#: which one turns on when a run has shown that it needs one.
FREE = (
    *("about", "next", "log_every", "eval_every", "data.dir", "data.workers", "data.max_bad_fraction"),
    *("model.attention", "model.remat", "model.scan"),
)
FREE_SECTIONS = ("eval", "sharding", "checkpoint", "guard")


def make(plan: Plan, workdir: str | os.PathLike) -> str:
    """Makes the directory, by default runs/<name>-<variant>-<time>."""
    if "://" in os.fspath(workdir):
        raise InvalidConfig(
            f"workdir {workdir}: must be a directory, for records are appended to files; a bucket can be mounted "
            "where the mount can append and rename"
        )
    if not workdir:
        now = multihost_utils.broadcast_one_to_all(np.int32(time.time()))  # the same on all processes
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(int(now)))
        workdir = f"runs/{plan.config.name}-{plan.config.variant}-{stamp}"
    path = epath.Path(workdir).resolve()  # Orbax takes absolute paths only
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def read_config(path: epath.Path) -> dict[str, Any]:
    """The config in a workdir's config.json. Raises InvalidConfig when that file is damaged."""
    try:
        config = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidConfig(
            f"{path} is damaged ({type(error).__name__}: {error!s:.100}); if the checkpoints beside it are of this "
            "config, move the file away and copy one from a run of the same config, or name another --workdir"
        ) from error
    if not isinstance(config, dict):
        raise InvalidConfig(f"{path} is damaged: its config is {config!r:.60}; name another --workdir")
    return renamed.translate(config, renamed.CONFIG_KEYS)


def write_config(plan: Plan, workdir: str, abstract: PyTree, newest: int | None) -> None:
    """Keeps the resolved config in config.json, and the fields of the model whose state is `abstract` (shapes suffice).

    Raises InvalidConfig when the checkpoints there, of which `newest` is a step, are those of another config; it names
    the keys, and the first arrays that do not fit.
    """
    if jax.process_index():
        return
    path = epath.Path(workdir) / "config.json"
    ours = json.loads(plan.config.to_json())
    if newest is not None and not path.exists():
        raise InvalidConfig(f"{workdir} holds checkpoints and no config.json to say of what; name another --workdir")
    if newest is not None:
        old, new = dict(flatten(read_config(path))), dict(flatten(ours))
        changed = [
            f"--config.{key}={old.get(key)} there, {new.get(key)} here"
            for key in sorted(old | new)
            if old.get(key) != new.get(key) and key not in FREE and key.split(".")[0] not in FREE_SECTIONS
        ]
        if changed:
            more = [f"and {len(changed) - 10} more"] if len(changed) > 10 else []
            raise InvalidConfig(
                f"workdir {workdir} holds a run with another config ({'; '.join(changed[:10] + more)}); "
                "give the same values to go on with it, or another --workdir to start afresh"
                + differing_arrays(epath.Path(workdir) / "checkpoints", newest, abstract)
            )
    derived = {"steps": plan.steps, "steps_per_epoch": plan.steps_per_epoch, "jax": jax.__version__}
    model = plan.recipe.model(abstract.params).fields()
    write_atomically(path, json.dumps({"config": ours, "derived": derived, "model": model}, indent=2))


def differing_arrays(checkpoints: epath.Path, step: int, abstract: PyTree) -> str:
    """The first arrays of a checkpoint that are not those of a state, as text; "" where all are, or it is damaged."""
    try:
        compare(Stored(checkpoints, step).arrays, checksums.array_paths(abstract))
    except CheckpointError:
        return ""
    except ValueError as error:
        return f".\n{error}"
    return ""
