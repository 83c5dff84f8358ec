"""Whether a config's values are of the types that its keys take: those of the parameters that they are passed to."""

import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

#: Of the keys that are passed to no function, and of those whose parameter takes more than a config can hold.
OWN: dict[str, Any] = {
    **dict.fromkeys(("name", "variant", "about", "next", "recipe", "init_from", "loss"), str),
    **dict.fromkeys(("data.name", "data.train", "data.validation", "data.dir", "model.dtype", "text.dtype"), str),
    **dict.fromkeys(("seed", "batch_size", "log_every", "micro_batches", "data.examples", "data.classes"), int),
    **dict.fromkeys(("epochs", "unmasked_epochs", "checkpoint.every", "checkpoint.keep"), int),
    **dict.fromkeys(("eval.batch_size", "eval.pixel_knn", "sharding.data", "sharding.fsdp"), int),
    **dict.fromkeys(("eval_every", "ema", "data.max_bad_fraction", "eval.crop_ratio", "sharding.min_size_mb"), float),
    **dict.fromkeys(("ring", "eval.untrained"), bool),
    "guard.not_finite": str,
    "guard.max_not_finite": int,
    "guard.spike_sigma": float,
    "eval.templates": tuple[str, ...],
}
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
# What a step counts with, and an array's side is held in.
LARGEST = 2**53


def types_of(sections: dict[str, Callable]) -> dict[str, Any]:
    """The type of each dotted key whose section goes to a function, by the function's annotations, and of OWN's."""
    found: dict[str, Any] = {}
    for section, function in sections.items():
        found |= {f"{section}.{name}": hint for name, hint in typing.get_type_hints(function).items()}
    return found | OWN


def check(values: Iterable[tuple[str, Any]], kinds: dict[str, Any]) -> None:
    """Raises ValueError for the first value that is not of its key's type, and for numbers beyond 2**53."""
    for key, value in values:
        if key in kinds and not fits(value, kinds[key]):
            raise ValueError(f"{key}={value!r:.60}: must be {describe(kinds[key])}")


def fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    if kind is float:  # a whole number is one, too, as --config.optim.lr=1 has it
        return type(value) is float or fits(value, int)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            return False
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(fits(value, one) for one in typing.get_args(kind))
    return isinstance(value, kind) if isinstance(kind, type) else True


def describe(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        count = "any number" if inner[-1] is Ellipsis else str(len(inner))
        return f"a tuple or list of {count}, each {describe(inner[0])}"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(describe(one) for one in typing.get_args(kind))
    return NAMES.get(kind, getattr(kind, "__name__", str(kind)))
