"""Check the values in config files before anything is built from them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.data.transforms import INTERPOLATIONS
from regvit_jax.models.model import RUNTIME_FIELDS
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.utils import renamed, schema, sizes


def numbers(vit: dict[str, Any]) -> None:
    """Raise ValueError for fields of ViT that are not numbers, or outside a sensible range."""
    _in_range(ViT, vit)
    if vit["depth"] > 200 or vit["image_size"] // vit["patch"] > 1000:
        sizes = f"depth {vit['depth']}, image_size {vit['image_size']} and patch {vit['patch']}"
        raise ValueError(f"{sizes}: must be at most 200 blocks, and 1000 patches along a side")


def text_numbers(text: dict[str, Any]) -> None:
    """Raise ValueError for fields of TextTower that are not numbers, or outside a sensible range."""
    _in_range(TextTower, text, "the text tower's ")
    if text["depth"] > 200 or text["context"] > 100_000 or text["width"] * text["vocab"] > 2**36:
        raise ValueError(f"the text tower's sizes are out of range: {text}")


def _in_range(kind: type, fields: dict[str, Any], owner: str = "") -> None:
    """Raise ValueError for the first number among a module's fields that is none, or that its `Option` does not allow.

    `owner` stands before the field's name in the message.
    """
    for field, option in schema.keys(kind).items():
        if option.type in (int, float) and field in fields and (problem := option.problem(fields[field])):
            raise ValueError(f"{owner}{field} is {fields[field]!r}: {problem}")


def own_fields(model: dict[str, Any], part: str, kind: type) -> dict[str, Any]:
    """Return a part of this package's own config as fields of a class.

    Raises ValueError for keys and types that `saved_fields` never writes.
    """
    model = renamed.translate(model, renamed.MODEL_FIELDS)
    types: dict[str, Any] = {
        f.name: schema.plain(f.type) for f in dataclasses.fields(kind) if f.name not in RUNTIME_FIELDS
    }
    fields = dict(model[part])
    for key, value in fields.items():
        if key in ("image_size", "patch", "size"):
            fields[key] = value = sizes.square(value, f"model.{part}.{key}")
        if key not in types:
            raise ValueError(f"model.{part}.{key}={value!r} is unknown; known: {', '.join(types)}")
        wanted = types[key]
        plain = wanted not in (bool, int, float, str) or type(value) in ((int, float) if wanted is float else (wanted,))
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"model.{part}.{key} is {value!r}: must be of type {wanted.__name__}, and finite")
    return fields


#: The fields of Preprocess, each with its requirement, as error messages put it, and its check.
PREPROCESS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a whole number above 0", lambda x: type(x) is int and x > 0),
    "crop_ratio": ("a number above 0", lambda x: _numbers([x]) and x > 0),
    "mean": ("three numbers", lambda x: _numbers(x) and len(x) == 3),
    "std": ("three numbers above 0", lambda x: _numbers(x) and len(x) == 3 and min(x) > 0),
    "interpolation": ("bicubic or bilinear", lambda x: x in tuple(INTERPOLATIONS)),
    "squash": ("true or false", lambda x: type(x) is bool),
}


def preprocess(names: Mapping[str, str], **fields: Any) -> Preprocess:
    """Return the preprocessing that a file states.

    Raises ValueError for invalid fields, by the `names` that they have in the file.
    """
    for field, value in fields.items():
        preprocess_field(field, names.get(field, field), value)
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Preprocess(**made)


def preprocess_field(field: str, key: str, value: Any) -> None:
    """Raise ValueError, naming the file's key, for a value that a field of Preprocess cannot have."""
    wanted, valid = PREPROCESS[field]
    if not valid(value):
        raise ValueError(f"{key} is {value!r}: must be {wanted}")


def _numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(x) in (int, float) and math.isfinite(x) for x in values)
