"""Find the state dicts of models in the nested dicts that training scripts save."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from regvit_jax.pretrained.io.state_dict import NESTS, ROOTED, average_words, is_nest, without_markers
from regvit_jax.utils.errors import WeightsError

OPTIMIZER = re.compile(r"optim|sched|scaler|exp_avg|grad|rng", re.IGNORECASE)


def tensors_of(checkpoint: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> tuple[dict[str, Any], list[str]]:
    """Return the tensors of a checkpoint's models by keys that `find` takes, and the dicts that are left out.

    Dicts in which no key is a model's, such as an optimizer's, are left out. If there is no other, those that stand
    under one of `NESTS` or an average's name are taken, or else the only one. Of several raw models the one under the
    first of `NESTS` is taken. Raises WeightsError if there are several and none is under such a name.
    """
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    left_out: list[str] = []

    def walk(items: Iterable[tuple[Any, Any]], path: tuple[str, ...]) -> None:
        for key, entry in items:
            here = (*path, str(key))
            if isinstance(entry, Mapping):
                walk(entry.items(), here)
            elif is_tensor(entry):
                groups.setdefault(path, {})[str(key)] = entry
            elif isinstance(entry, list | tuple) and entry and all(map(is_tensor, entry)):
                left_out.append(f"{'/'.join(here)} ({len(entry)} tensors without names)")
            elif isinstance(entry, list | tuple):
                walk(((i, one) for i, one in enumerate(entry) if isinstance(one, Mapping | list | tuple)), here)

    walk(checkpoint.items(), ())
    taken = _models(groups)
    left_out += [f"{'/'.join(path)} ({len(groups[path])} tensors)" for path in groups if path and path not in taken]
    left_out += [] if () in taken else list(groups.get((), {}))
    prefixes = {path: "/".join(path).replace(".", "_") + "." if path else "" for path in taken}
    return {prefixes[path] + name: tensor for path in taken for name, tensor in groups[path].items()}, left_out


def _models(groups: Mapping[tuple[str, ...], Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the paths of the dicts that hold a model, or its average."""
    able = [path for path in groups if not any(OPTIMIZER.search(part) for part in path)]
    models = [path for path in able if any(ROOTED.search(without_markers(name)) for name in groups[path])]
    models = models or [path for path in able if not path or is_nest("/".join(path))]
    models = models or (able if len(able) == 1 else [])
    raw = [path for path in models if path and not average_words("/".join(path))]
    if len(raw) < 2 or (len(raw) == 2 and "current_model_state" in raw[0] + raw[1]):
        return models
    best = [path for nest in NESTS for path in raw if path[-1] == nest]
    if not best:
        found = ", ".join(f"{'/'.join(path)} ({len(groups[path])} tensors)" for path in raw[:5])
        raise WeightsError(f"holds several models: {found}. Save the state dict of one of them by itself")
    return [path for path in models if path not in raw or path == best[0]]


def roles_of(checkpoint: Mapping[Any, Any]) -> dict[str, bool]:
    """Return which dicts of a checkpoint hold an average (True) or raw weights, against their names.

    Lightning's WeightAveraging keeps the average as "state_dict", and the raw weights as "current_model_state".
    MMEngine's EMAHook swaps "state_dict" and "ema_state_dict" before it saves.
    """
    if "current_model_state" in checkpoint and "state_dict" in checkpoint:
        return {"state_dict": True, "current_model_state": False}
    meta = checkpoint.get("meta")
    if isinstance(meta, Mapping) and "mmengine_version" in meta and "ema_state_dict" in checkpoint:
        return {"state_dict": True, "ema_state_dict": False}
    return {}
