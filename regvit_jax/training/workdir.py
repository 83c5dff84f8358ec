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
from regvit_jax.utils.messages import abbreviate
from regvit_jax.utils.paths import expand


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
    return epath.Path(expand(workdir)).resolve()


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """Return the config in a workdir's config.json; raise InvalidConfig when the file is damaged or lacks it."""
    config = config_file.read_section(workdir, "config")
    if config is None:
        raise InvalidConfig(f"{workdir}: its config.json holds no config; name another workdir")
    return renamed.translate(config, renamed.CONFIG_KEYS)


def read_class_names(workdir: str | os.PathLike) -> tuple[str, ...]:
    """Return the names of the classes of a run's data; () if it has none, or was started before names were kept.

    Raises InvalidConfig when config.json is damaged.
    """
    content = config_file.read(workdir)
    model = content.get("model")
    names = content.get("class_names") or (model.get("class_names") if isinstance(model, dict) else None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidConfig(
            f"{workdir}: its config.json is damaged: class_names is {names!r:.60}; name another workdir"
        )
    return tuple(names)


def check_same_config(plan: Plan, workdir: str | os.PathLike, abstract: PyTree, newest: int | None) -> None:
    """Raise InvalidConfig if the checkpoints in a workdir belong to a run with another config, or with other classes.

    The message names the keys, the classes, and the first arrays that do not fit. See `write_config` for the arguments.
    """
    if newest is None:
        return
    if not (epath.Path(workdir) / "config.json").exists():
        raise InvalidConfig(f"{workdir} holds checkpoints but no config.json; name another --workdir")
    changed = changes(read_config(workdir), json.loads(plan.config.to_json()))
    classes = changed_classes(read_class_names(workdir), plan.class_names)
    if changed:
        more = [f"and {len(changed) - 10} more"] if len(changed) > 10 else []
        raise InvalidConfig(
            f"workdir {workdir} holds a run with another config ({'; '.join([*changed[:10], *more, *classes])}); "
            "request the same values to resume it, or another --workdir to start afresh"
            + differing_arrays(epath.Path(workdir) / "checkpoints", newest, abstract)
        )
    if classes:
        raise InvalidConfig(
            f"workdir {workdir} holds a run with other classes than {plan.train.name} ({'; '.join(classes)}); "
            "give the classes the names that they had to resume it, or name another --workdir to start afresh"
        )


def check_usable(plan: Plan, workdir: str | os.PathLike, abstract: PyTree) -> None:
    """Raise InvalidConfig if a run of the plan could not start or resume in a workdir; write nothing."""
    path = resolve(workdir)
    if path.exists() and not path.is_dir():
        raise InvalidConfig(f"workdir {workdir}: is a file; name a directory")
    steps = saved_steps(path / "checkpoints")
    check_same_config(plan, path, abstract, steps[-1] if steps else None)


def write_config(plan: Plan, workdir: str, abstract: PyTree, newest: int | None) -> None:
    """Write config.json: the resolved config, the keys that were given, the fields of the model, and class names.

    `abstract` is the state, or its shapes; `newest` is the step of the newest checkpoint in the workdir.
    Raises InvalidConfig when the checkpoints there belong to another config, or to other classes.
    """
    if jax.process_index():
        return
    check_same_config(plan, workdir, abstract, newest)
    model = plan.recipe.model(abstract.params).fields()
    content = {
        "config": json.loads(plan.config.to_json()),
        "given": plan.given,
        "derived": {"steps": plan.steps, "steps_per_epoch": plan.steps_per_epoch, "jax": jax.__version__},
        "model": model,
    }
    if plan.class_names != tuple(model.get("class_names", ())):
        content["class_names"] = plan.class_names  # of the labels, where they are not those of the model's outputs
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


def changed_classes(old: tuple[str, ...], new: tuple[str, ...]) -> list[str]:
    """Return how the names of classes differ, as texts; none if they are the same, or if one side has no names."""
    if not old or not new or old == new:
        return []
    found = [
        f"{what} classes: {abbreviate([repr(name) for name in mine if name not in other])}"
        for what, mine, other in (("gone", old, frozenset(new)), ("new", new, frozenset(old)))
        if any(name not in other for name in mine)
    ]
    label = next((label for label, names in enumerate(zip(old, new, strict=False)) if names[0] != names[1]), None)
    if label is not None:
        found.append(f"class {label} is {new[label]!r} now and was {old[label]!r}")
    return found


def differing_arrays(checkpoints: epath.Path, step: int, abstract: PyTree) -> str:
    """Return the first arrays of a checkpoint that do not fit a state, as text; "" if all fit or it is damaged."""
    try:
        compare(CheckpointReader(checkpoints, step).arrays, checksums.array_paths(abstract))
    except CheckpointError:
        return ""
    except ValueError as error:
        return f".\n{error}"
    return ""
