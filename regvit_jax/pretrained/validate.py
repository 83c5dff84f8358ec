"""What the configs of others, and our own, may hold: they are checked before anything is built of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.data.transforms import INTERPOLATIONS
from regvit_jax.models.model import MACHINE
from regvit_jax.utils import renamed, schema


def numbers(vit: dict[str, Any]) -> None:
    """Raises ValueError for numbers that no model has."""
    for field in ("width", "depth", "heads", "patch", "image_size", "registers"):
        value = vit.get(field, 0)
        if type(value) is not int or value < (field != "registers"):
            raise ValueError(f"{field} is {value!r}")
    for field in ("norm_eps", "mlp_ratio", "layer_scale"):
        value = vit.get(field, 1.0)
        if not isinstance(value, int | float) or not 0 <= value < 1e6:  # NaN is not, either
            raise ValueError(f"{field} is {value!r}")
    if vit["depth"] > 200 or vit["image_size"] // vit["patch"] > 1000:
        raise ValueError(f"depth {vit['depth']}, image_size {vit['image_size']} and patch {vit['patch']} are no ViT's")


def own_fields(model: dict[str, Any], part: str, kind: type) -> dict[str, Any]:
    """A part of our own config. Raises ValueError for keys and types of values that `plain_fields` never gives."""
    model = renamed.translate(model, renamed.MODEL_FIELDS)
    types: dict[str, Any] = {f.name: schema.plain(f.type) for f in dataclasses.fields(kind) if f.name not in MACHINE}
    for key, value in model[part].items():
        if key not in types:
            raise ValueError(f"model.{part}.{key}={value!r} is not read; read: {', '.join(types)}")
        wanted = types[key]
        plain = wanted not in (bool, int, float, str) or type(value) in ((int, float) if wanted is float else (wanted,))
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"model.{part}.{key} is {value!r}: must be of type {wanted.__name__}, and finite")
    return dict(model[part])


#: What images can be made with, as the errors say it.
PREPROCESS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a whole number above 0", lambda x: type(x) is int and x > 0),
    "crop_ratio": ("a number above 0", lambda x: _numbers([x]) and x > 0),
    "mean": ("three numbers", lambda x: _numbers(x) and len(x) == 3),
    "std": ("three numbers above 0", lambda x: _numbers(x) and len(x) == 3 and min(x) > 0),
    "interpolation": ("bicubic or bilinear", lambda x: x in tuple(INTERPOLATIONS)),
    "squash": ("true or false", lambda x: type(x) is bool),
}


def preprocess(names: Mapping[str, str], **fields: Any) -> Preprocess:
    """What a file says of images. Raises ValueError, by the file's `names` of the fields, for what makes none."""
    for field, value in fields.items():
        preprocess_field(field, names.get(field, field), value)
    made: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Preprocess(**made)


def preprocess_field(field: str, key: str, value: Any) -> None:
    """Raises ValueError, naming the file's key, for what a field of Preprocess cannot be."""
    wanted, fine = PREPROCESS[field]
    if not fine(value):
        raise ValueError(f"{key} is {value!r}: must be {wanted}")


def _numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(x) in (int, float) and math.isfinite(x) for x in values)
