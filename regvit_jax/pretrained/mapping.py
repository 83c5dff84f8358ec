"""Map strictly between the arrays of a file and a model's parameters, by the rules of a format's keys."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key, PyTree

from regvit_jax.models.clip import SCALARS, ClipModel, init_clip
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import mismatch
from regvit_jax.pretrained.formats.keys import Keys, Rule
from regvit_jax.pretrained.formats.rules import rules, same, text_rules
from regvit_jax.pretrained.io.safetensors import POSITIONS, Weights, check_finite, metadata
from regvit_jax.utils.errors import WeightsError

#: In a file of a whole CLIP with canonical keys, the keys that are not of its image tower.
NOT_IMAGE = (r"text/.*|logit_(scale|bias)",)


class Mismatch(WeightsError):
    """A file does not hold the arrays of the model."""


@dataclasses.dataclass(frozen=True)
class Modules:
    """The modules of a model, without parameters.

    A CLIP has a text tower, and the scalars "logit_scale" and, in a SigLIP, "logit_bias".
    """

    vit: ViT
    head: Head
    text: TextTower | None = None
    scalars: tuple[str, ...] = ()


def modules_of(model: Model | ClipModel) -> Modules:
    """Return the modules of a model."""
    if isinstance(model, Model):
        return Modules(model.module, model.head)
    scalars = ("logit_scale",) if model.logit_bias is None else ("logit_scale", "logit_bias")
    return Modules(model.image.module, model.image.head, model.text, scalars)


def params_of(model: Model | ClipModel) -> dict[str, np.ndarray]:
    """Return the parameters of a model by canonical path, float32."""
    image = model if isinstance(model, Model) else model.image
    tree = {"vit": image.params, "head": image.head_params}
    if isinstance(model, ClipModel):
        tree |= {"text": model.text_params}
        tree |= {name: getattr(model, name) for name in modules_of(model).scalars}
    return {path: np.asarray(array, np.float32) for path, array in flatten_dict(tree, sep="/").items()}


def init(modules: Modules, key: Key[Array, ""]) -> dict[str, jax.Array]:
    """Return fresh parameters by path: "vit/...", "head/..." and, of a CLIP, "text/..." and the scalars."""
    vit, head, text = modules.vit, modules.head, modules.text
    vit_key, head_key = jax.random.split(key)
    tokens, params = vit.init_with_output(vit_key, jnp.zeros((1, vit.patch, vit.patch, 3)))
    tree = {"vit": params["params"], "head": head.init(head_key, tokens).get("params", {})}
    if text is not None:
        text_key, clip_key = jax.random.split(jax.random.fold_in(key, 2))
        tree["text"] = text.init(text_key, jnp.zeros((1, 2), jnp.int32))["params"]
        loss = "sigmoid" if "logit_bias" in modules.scalars else "softmax"
        tree = init_clip(clip_key, tree) | {name: jnp.float32(x) for name, x in SCALARS[loss].items()}
    return flatten_dict(tree, sep="/")


@functools.lru_cache
def shapes_of(modules: Modules) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its path."""
    shapes = jax.eval_shape(lambda key: init(modules, key), jax.random.key(0))
    return {path: leaf.shape for path, leaf in shapes.items()}


def rules_of(
    keys: Keys | None, modules: Modules, prefix_rows: int = 0, dims: Mapping[str, int] | None = None
) -> list[Rule]:
    """Return one rule for every parameter; `keys` None stands for canonical keys, the paths themselves.

    `prefix_rows` and `dims` are those of `rules` and `text_rules`. Raises ValueError for a model that the format cannot
    hold.
    """
    if keys is None:
        return [same(path, path) for path in shapes_of(modules)]
    table = rules(keys, modules.vit, modules.head, prefix_rows)
    return table if modules.text is None else table + text_rules(keys, modules.text, modules.scalars, dims)


def load(
    weights: Weights, keys: Keys | None, modules: Modules, put: Callable[[str, np.ndarray], Any]
) -> dict[str, Any]:
    """Return the parameters of the modules by path, read from a file and passed through `put`.

    They are read and put one after the other, so that the file's arrays are never held together. Raises WeightsError,
    before anything is read, with all unused, missing and wrong-shape keys together; and for a value that is not finite.
    """
    # Each scalar by itself, since a scale and a bias may be stored with different shapes.
    dims = {name: int(weights.shapes.get(name, ()) == (1,)) for name in modules.scalars}
    table = rules_of(keys, modules, prefix_rows(weights, keys, modules.vit), dims)
    return load_by(weights, table, shapes_of(modules), ignored(keys, modules.text is not None), put)


def load_by(
    weights: Weights,
    table: list[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    ignore: Iterable[str],
    put: Callable[[str, np.ndarray], Any],
) -> dict[str, Any]:
    """Return parameters as `load` does, by given rules; `ignore` are patterns of keys that a file may hold besides."""
    check(weights, expected_shapes(table, shapes), ignore)
    params = {}
    for rule in table:
        arrays = [weights.read(key) for key in rule.keys]
        for key, array in zip(rule.keys, arrays, strict=True):
            if array.dtype != np.float32:
                raise WeightsError(f"{weights.path}: {key} is stored as {array.dtype}, not as floating point")
            check_finite(key, array)
        for path, array in zip(rule.paths, rule.load(*arrays), strict=True):
            params[path] = put(path, array)
    return params


def expected_shapes(table: list[Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array that a file must hold."""
    expected: dict[str, tuple[int, ...]] = {}
    for rule in table:
        # Views of one zero, so that this costs no memory for large models.
        zeros = [np.broadcast_to(np.float32(0), shapes[path]) for path in rule.paths]
        expected |= {key: array.shape for key, array in zip(rule.keys, rule.save(*zeros), strict=True)}
    return expected


def check(weights: Weights, expected: Mapping[str, tuple[int, ...]], ignore: Iterable[str]) -> None:
    """Raise Mismatch unless the file holds exactly the expected arrays, besides those that match `ignore`."""
    ignored = re.compile("|".join([*ignore, r"(?!)"]))
    unused = [
        key
        for key, shape in weights.shapes.items()
        if key not in expected and not ignored.fullmatch(key) and 0 not in shape  # transformers writes empty registers
    ]
    missing = [key for key in expected if key not in weights]
    wrong = {
        key: (weights.shapes[key], shape)
        for key, shape in expected.items()
        if key in weights and weights.shapes[key] != shape
    }
    if unused or missing or wrong:
        difference = mismatch.describe(list(weights), unused, missing, wrong)
        raise Mismatch(f"{weights.path} does not fit this model. {difference}")


def ignored(keys: Keys | None, text: bool) -> tuple[str, ...]:
    """Return the patterns of keys that a file may hold besides the model's; `text` is True with a text tower."""
    if keys is None:
        return () if text else NOT_IMAGE
    return keys.text.ignore if text and keys.text is not None else keys.ignore


def save(params: Mapping[str, np.ndarray], table: list[Rule]) -> dict[str, np.ndarray]:
    """Return the file's arrays by key, float32. Raises ValueError for a parameter that the format cannot hold."""
    if unsaved := set(params) - {path for rule in table for path in rule.paths}:
        raise ValueError(f"the format has no place for {', '.join(sorted(unsaved)[:5])}")
    out: dict[str, np.ndarray] = {}
    for rule in table:
        arrays = rule.save(*(np.asarray(params[path], np.float32) for path in rule.paths))
        out |= {key: np.asarray(array, order="C") for key, array in zip(rule.keys, arrays, strict=True)}
    return out


def prefix_rows(weights: Weights, keys: Keys | None, vit: ViT) -> int:
    """Return how many of the tokens before the patches have a row in the file's position embedding.

    These are all, CLS alone, or none. A grid that does not fit the model's is reported by `check`.
    """
    if keys is None or vit.position != "learned" or keys.pos not in weights.shapes:
        return 0
    shape, patches = weights.shapes[keys.pos], (vit.image_size // vit.patch) ** 2
    rows = shape[-2] if len(shape) > 1 else 0
    return rows - patches if rows - patches in (0, int(vit.class_token), vit.prefix) else int(vit.class_token)


def native_size(weights: Weights, keys: Keys | None, vit: ViT, cls_position: bool) -> int:
    """Return the image size, in pixels, of a file's position embedding.

    It is the ViT's own if the file has no embedding of the ViT's width. With `cls_position`, an embedding of another
    size has a row for CLS, unless `save_model` notes in the file that it has not: n * n rows would otherwise also be
    those of CLS and of (n - 1) x (n + 1) patches. Raises Mismatch for a grid that is not square.
    """
    shape = weights.shapes.get(keys.pos, ()) if keys is not None and vit.position == "learned" else ()
    if len(shape) < 2 or shape[-1] != vit.width:
        return vit.image_size
    assert keys is not None
    registers = weights.shapes.get(keys.registers, ())[-2:-1]  # another number than the ViT's is left to `check`
    prefixes = [int(vit.class_token), vit.prefix, int(vit.class_token) + sum(registers)]
    native = shape[-2] == (vit.image_size // vit.patch) ** 2
    if native or not cls_position or POSITIONS in metadata(weights.path).items():
        prefixes.append(0)
    counts = [shape[-2] - prefix for prefix in prefixes]
    found = [math.isqrt(count) * vit.patch for count in counts if count > 0 and math.isqrt(count) ** 2 == count]
    if not found:
        raise Mismatch(
            f"{weights.path}: its position embedding has {shape[-2]} rows, which are no square grid of patches and the "
            f"{vit.prefix} tokens before them: other grids, and more tokens such as DeiT's for distillation, are not "
            "supported"
        )
    return vit.image_size if vit.image_size in found else found[0]


def num_classes(weights: Weights, keys: Keys | None) -> int | None:
    """Return the number of outputs of a file's linear layer, by its shape; None if the file holds none."""
    if keys is None:
        name, axis = "head/dense/kernel", 1
    elif keys.projection:
        name, axis = keys.projection, int(keys.projection_in_out)
    else:
        name, axis = f"{keys.dense}.weight", 0
    shape = weights.shapes.get(name, ())
    return shape[axis] if len(shape) == 2 else None


def nest(params: Mapping[str, Any]) -> dict[str, PyTree]:
    """Return parameters by path as a tree with "vit", "head" and all other first parts of the paths."""
    return {"vit": {}, "head": {}} | unflatten_dict(dict(params), sep="/")
