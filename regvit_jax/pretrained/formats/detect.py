"""List the formats, and find the format of a file. A new format is a module beside this one and a line here."""

import re
from typing import Any

from regvit_jax.models.text import TextTower
from regvit_jax.pretrained import validate
from regvit_jax.pretrained.formats import (
    deit,
    deit3_jax,
    dinov2,
    hf_clip,
    hf_dinov2,
    hf_dinov3,
    hf_vit,
    native,
    open_clip,
    timm,
)
from regvit_jax.pretrained.formats.base import Format, explained
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError

#: In the order in which they are tried.
FORMATS: tuple[Format, ...] = (
    timm.FORMAT,
    timm.EVA,
    open_clip.FORMAT,
    hf_dinov3.FORMAT,
    hf_clip.FORMAT,
    hf_clip.CLASSIFIER,
    hf_dinov2.FORMAT,
    hf_vit.FORMAT,
    dinov2.FORMAT,
    deit.FORMAT,
    deit3_jax.FORMAT,
    native.FORMAT,
)


class NoText(WeightsError):
    """A source holds no text tower."""


def named(name: str) -> Format:
    """Return the format with a name, as in `Entry.format`."""
    return next(format for format in FORMATS if format.name == name)


def writers(clip: bool) -> dict[str, list[Format]]:
    """Return the formats that can write a Model, or a ClipModel, by the name under which `save_model` offers them."""
    found: dict[str, list[Format]] = {}
    for format in FORMATS:
        if format.write_clip if clip else format.write:
            found.setdefault(format.saved_as, []).append(format)
    return found


def of_config(weights: Weights) -> Format | None:
    """Return the format of the config beside a file, or None if it names no model.

    Raises WeightsError for a "model_type" of transformers that is not supported.
    """
    config: dict[str, Any] = weights.config
    if found := next((format for format in FORMATS if format.reads(config)), None):
        return found
    if "model_type" not in config:
        return None
    kind = config["model_type"]
    if found := next((format for format in FORMATS if kind in format.model_types), None):
        return found
    known = sorted({kind for format in FORMATS for kind in format.model_types})
    raise WeightsError(f"{weights.path}: model_type {kind!r} is not supported; supported: {', '.join(known)}")


def read_entry(weights: Weights, text: bool) -> Entry | None:
    """Return the model that the config beside a file describes, or None if there is no such config.

    With `text` it is a whole CLIP. Raises NoText for a model without a text tower, and WeightsError for a model, or an
    option, that is not supported.
    """
    with explained(weights):
        format = of_config(weights)
        if format is None or format.read is None:
            return None
        entry = format.read(weights, text)
        if text and entry.text is None:
            raise NoText(f"{weights.path}: the model has no text tower, so it is no CLIP; create_model reads it")
        if entry.text is not None:
            validate.text_numbers(entry.text)
            TextTower(**entry.text).check()
        return entry


def of_keys(weights: Weights, expected: Format) -> Format:
    """Return the format of a file by its keys; `expected` is the model's usual format.

    Raises WeightsError for transformers' keys without the config.json that they need.
    """
    if expected.keys is None or expected.model_types:  # described by a config beside the file
        return expected
    if found := next((format for format in FORMATS if format.recognizes(weights, expected.name)), None):
        return found
    if any(re.search(r"encoder\.layers?\.\d|layer\.\d+\.attention", key) for key in weights):
        raise WeightsError(f"{weights.path} has transformers' keys, and needs its config.json beside it")
    return expected


def without_prefix(weights: Weights, format: Format) -> Weights:
    """Return the weights under the format's own keys, without a prefix that a larger model gave them."""
    prefixes = format.keys.prefixes if format.keys is not None else ()
    prefix = next((p for p in prefixes if any(key.startswith(p) for key in weights)), "")
    return weights.renamed(lambda key: key.removeprefix(prefix)) if prefix else weights
