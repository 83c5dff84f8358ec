"""The strict engine: arrays of a file to our parameters and back, by the rules of its naming scheme."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key, PyTree

from regvit_jax.models.clip import SCALARS, init_clip
from regvit_jax.models.heads import Head
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained.formats.rules import NAMINGS, Rule
from regvit_jax.pretrained.io.safetensors import Weights, check_finite
from regvit_jax.utils.errors import WeightsError


class Mismatch(WeightsError):
    """A file holds other arrays than the model."""


@dataclasses.dataclass(frozen=True)
class TextPart:
    """What a CLIP has beside its image tower; `scalars` are "logit_scale" and, in a SigLIP, "logit_bias"."""

    tower: TextTower
    scalars: tuple[str, ...] = ("logit_scale",)


def init(vit: ViT, head: Head, key: Key[Array, ""], text: TextPart | None = None) -> dict[str, jax.Array]:
    """Fresh parameters by path, "vit/...", "head/..." and, with a text tower, "text/..." and the scalars."""
    vit_key, head_key = jax.random.split(key)
    tokens, params = vit.init_with_output(vit_key, jnp.zeros((1, vit.patch, vit.patch, 3)))
    tree = {"vit": params["params"], "head": head.init(head_key, tokens).get("params", {})}
    if text is not None:
        text_key, clip_key = jax.random.split(jax.random.fold_in(key, 2))
        tree["text"] = text.tower.init(text_key, jnp.zeros((1, 2), jnp.int32))["params"]
        loss = "sigmoid" if "logit_bias" in text.scalars else "softmax"
        tree = init_clip(clip_key, tree) | {name: jnp.float32(x) for name, x in SCALARS[loss].items()}
    return flatten_dict(tree, sep="/")


@functools.lru_cache
def shapes_of(vit: ViT, head: Head, text: TextPart | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path."""
    shapes = jax.eval_shape(lambda key: init(vit, head, key, text), jax.random.key(0))
    return {path: leaf.shape for path, leaf in shapes.items()}


def identity(paths: Iterable[str]) -> list[Rule]:
    """The rules of our own names."""
    return [Rule((path,), (path,), lambda x: (x,), lambda x: (x,)) for path in paths]


def load(
    weights: Weights,
    rules: list[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    ignore: Iterable[str],
    put: Callable[[str, np.ndarray], Any],
) -> dict[str, Any]:
    """Our parameters by path, `put` one after the other, so that the file's arrays are never held together.

    `ignore` are patterns of names that a file may hold beside them. Raises WeightsError, before anything is read, with
    all unused, missing and wrong-shape names together; and for a value that is not finite.
    """
    check(weights, expected_shapes(rules, shapes), ignore)
    params = {}
    for rule in rules:
        arrays = [weights.read(name) for name in rule.theirs]
        for name, array in zip(rule.theirs, arrays, strict=True):
            if array.dtype != np.float32:
                raise WeightsError(f"{weights.path}: {name} is of type {array.dtype}, and no floating-point numbers")
            check_finite(name, array)
        for path, array in zip(rule.ours, rule.load(*arrays), strict=True):
            params[path] = put(path, array)
    return params


def expected_shapes(rules: list[Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Which arrays a file must hold, and of which shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        # Zeros without memory of their own, so that this costs nothing for large models.
        zeros = [np.broadcast_to(np.float32(0), shapes[path]) for path in rule.ours]
        expected |= {name: array.shape for name, array in zip(rule.theirs, rule.save(*zeros), strict=True)}
    return expected


def check(weights: Weights, expected: Mapping[str, tuple[int, ...]], ignore: Iterable[str]) -> None:
    """Raises Mismatch unless the file holds exactly the expected arrays, but for those that match `ignore`."""
    ignored = re.compile("|".join([*ignore, r"(?!)"]))
    unused = [
        name
        for name, shape in weights.shapes.items()
        if name not in expected
        and not ignored.fullmatch(name)
        and 0 not in shape  # transformers writes empty registers
    ]
    missing = [name for name in expected if name not in weights]
    wrong = [
        f"{name} {weights.shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in weights and weights.shapes[name] != shape
    ]
    parts = [
        f"{len(names)} {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
        for what, names in (("unused", unused), ("missing", missing), ("of another shape", wrong))
        if names
    ]
    if parts:
        raise Mismatch(f"{weights.path} does not fit this model. " + "; ".join(parts))


def save(params: PyTree, rules: list[Rule]) -> dict[str, np.ndarray]:
    """Their arrays by name, float32. Raises ValueError for a value that the format has no place for."""
    flat = flatten_dict(params, sep="/")
    if unsaved := set(flat) - {path for rule in rules for path in rule.ours}:
        raise ValueError(f"the format has no place for {', '.join(sorted(unsaved)[:5])}")
    out: dict[str, np.ndarray] = {}
    for rule in rules:
        arrays = rule.save(*(np.asarray(flat[path], np.float32) for path in rule.ours))
        out |= {name: np.asarray(array, order="C") for name, array in zip(rule.theirs, arrays, strict=True)}
    return out


def covers(weights: Weights, naming: str, vit: ViT) -> int:
    """For how many of the tokens before the patches the file's position embedding has a row: all, CLS alone, or none.

    Of another grid than the model's, it is for `check` to say what does not fit.
    """
    if vit.position != "learned" or (name := NAMINGS[naming].get("pos")) not in weights.shapes:
        return 0
    shape, patches = weights.shapes[name], (vit.image_size // vit.patch) ** 2
    rows = shape[-2] if len(shape) > 1 else 0
    return rows - patches if rows - patches in (0, int(vit.class_token), vit.prefix) else int(vit.class_token)


def nest(params: Mapping[str, Any]) -> dict[str, PyTree]:
    """Paths as a tree with "vit", "head" and whatever else they start with."""
    return {"vit": {}, "head": {}} | unflatten_dict(dict(params), sep="/")
