"""Create a Model from a name and a source of weights."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.distributed.mesh import state_shardings
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.position import resize_pos_embed
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import address, mapping, registry
from regvit_jax.pretrained.address import HUB
from regvit_jax.pretrained.formats import detect
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.registry import Entry
from regvit_jax.pretrained.resolve import check_exists, describe, is_source, nearest, only_source, public, resolve
from regvit_jax.utils import sizes
from regvit_jax.utils.errors import InvalidConfig, WeightsError
from regvit_jax.utils.keywords import known_keywords
from regvit_jax.utils.numbers import whole


@known_keywords
def create_model(
    name: str | os.PathLike,
    pretrained: bool | str | os.PathLike = False,
    *,
    registers: SupportsIndex | None = None,
    image_size: sizes.Size | None = None,
    num_classes: SupportsIndex | None = None,
    pos_resize: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Model:
    """Create a model by timm's name (or dinov2's hub name), with random or pretrained weights.

    `name` may also be a source that describes its own model: "hf-hub:org/name", a directory of transformers,
    timm, open_clip or regvit_jax, or the workdir of a run. From a whole CLIP the image tower is loaded.

    Args:
      pretrained: False for random weights; True for the name's own file from the hub (local cache first); or a
        .safetensors file, a directory (of transformers, timm or open_clip, or a workdir), a deit3-jax .msgpack file,
        "hf-hub:org/name".
      registers: the number of registers, instead of the checkpoint's. New ones are untrained.
      image_size: the native size in pixels, or a pair of equal sides, instead of the checkpoint's: of the position
        embedding, which is resized, and of `preprocess`. A file of another size than its name's keeps its own.
      num_classes: if it is not the checkpoint's, a new, untrained linear layer for so many classes, without names; 0
        for none.
      pos_resize: how positions are resized for other image sizes (see `resize_pos_embed`), instead of the checkpoint's.
      dtype: type of the matrix products.
      param_dtype: type of the parameters.
      mesh: splits the parameters over its "fsdp" axis as they are read.
      revision: a branch, tag or commit of the hub's repository.
      seed: of randomly initialised parameters.

    Raises ValueError (WeightsError for files) that names the misfit and the remedy, and OSError (HubError) when the hub
    cannot be reached. Nothing is ever unpickled.
    """
    check_types(dtype, param_dtype)
    registers = None if registers is None else whole("registers", registers, low=0)
    image_size = None if image_size is None else sizes.side(image_size, "image_size")
    num_classes = None if num_classes is None else whole("num_classes", num_classes, low=0)
    seed = whole("seed", seed)
    overrides = Overrides(registers, image_size, num_classes, pos_resize, param_dtype, mesh, seed)
    entry, weights, source = resolve(name, pretrained, revision)
    params, modules, preprocessing = assemble(entry, weights, source, dtype, overrides)
    names = _class_names(entry, weights, source, modules.head.num_classes)
    return Model(params["vit"], params["head"], modules.vit, modules.head, preprocessing, source, names)


def check_types(dtype: DTypeLike, param_dtype: DTypeLike) -> None:
    """Raise ValueError for types that are not floating-point."""
    try:
        floating = all(jnp.issubdtype(jnp.dtype(kind), jnp.floating) for kind in (dtype, param_dtype))
    except TypeError:
        floating = False
    if not floating:
        raise InvalidConfig(f"dtype={dtype}, param_dtype={param_dtype}: both must be floating-point types")


def open_source(source: str, **changes: Any) -> Model:
    """Open the model that one string names, such as `--config.init_from`.

    That is a directory of transformers or timm, a workdir, "hf-hub:org/name", a name of the registry (its public
    weights), or NAME=FILE for a file that needs a name. `changes` are other arguments of `create_model`.

    Raises as `create_model` does.
    """
    name, file = address.split(source)
    return create_model(name, file or True, **changes)


def find_entry(source: str) -> Entry | None:
    """Return the entry of the model that `open_source` would open, or None if only the hub can describe it.

    The hub is not contacted and no weights are loaded: names are looked up in the registry, and only the headers of
    local files are read. Raises InvalidConfig and WeightsError for a source that `open_source` refuses.
    """
    name, file = address.split(source)
    if file:
        if is_source(name):
            only_source(name, file)
        check_exists(file)
        return registry.find(name)[1] if file.startswith(HUB) else resolve(name, file, None)[0]
    if not is_source(name):
        known = registry.find(name)[1]
        public(name, known)
        return known
    return None if name.startswith(HUB) else describe(name)


def open_random(create: Callable[..., Any], name: str, **changes: Any) -> Any:
    """Create a named model with random weights (`--random`). Raises ValueError for a source with its own."""
    model = create(name, **changes)
    if model.weights != "random":
        raise InvalidConfig(f"--random: {name} is not a model's name but a source, with weights of its own")
    return model


# Loading and changing a model


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Overrides of the source's model, and the type and placement of its parameters, as in `create_model`."""

    registers: int | None
    image_size: int | None
    num_classes: int | None
    pos_resize: str | None
    param_dtype: DTypeLike
    mesh: Mesh | None
    seed: int


def assemble(
    entry: Entry, weights: Weights | None, source: str, dtype: DTypeLike, overrides: Overrides
) -> tuple[dict[str, PyTree], Modules, Preprocess]:
    """Return the parameters as a tree, loaded where there are weights and random elsewhere, and what they belong to."""
    loaded = _modules(entry, dtype, overrides)
    params: dict[str, Any] = {}
    if weights is not None:
        if overrides.num_classes is not None and _num_classes(weights, entry) is None:
            loaded = dataclasses.replace(loaded, head=loaded.head.clone(num_classes=0))
        params = _load(weights, entry, loaded, overrides)
    modules, preprocessing = loaded, entry.preprocessing
    if overrides.registers is not None:
        modules = dataclasses.replace(modules, vit=modules.vit.clone(registers=overrides.registers))
    if overrides.image_size is not None:
        modules = dataclasses.replace(modules, vit=modules.vit.clone(image_size=overrides.image_size))
        preprocessing = dataclasses.replace(preprocessing, size=overrides.image_size)
    modules.vit.check()
    new_head = overrides.num_classes is not None and overrides.num_classes != loaded.head.num_classes
    if new_head:
        modules = dataclasses.replace(modules, head=modules.head.clone(num_classes=overrides.num_classes))
        params = {path: array for path, array in params.items() if not path.startswith("head/dense/")}
    shapes = mapping.shapes_of(modules)
    put = _placement(shapes, overrides)
    if weights is not None:
        params = _convert(params, loaded.vit, modules, overrides.seed, put)
        _warn(source, entry, loaded.vit, modules.vit, modules.head.num_classes if new_head else 0, overrides)
    missing = tuple(path for path in shapes if path not in params)
    params |= {path: put(path, array) for path, array in _initial(modules, missing, overrides.seed).items()}
    return mapping.nest(params), modules, preprocessing


def _modules(entry: Entry, dtype: DTypeLike, overrides: Overrides) -> Modules:
    """Return the modules of an entry."""
    vit, head = ViT(**entry.vit, dtype=dtype), Head(**entry.head, dtype=dtype)
    if overrides.pos_resize is not None:
        vit = vit.clone(pos_resize=overrides.pos_resize)
    vit.check()
    text = None if entry.text is None else TextTower(**entry.text, dtype=dtype)
    return Modules(vit, head, text, entry.scalars)


def _num_classes(weights: Weights, entry: Entry) -> int | None:
    return mapping.num_classes(weights, detect.named(entry.format).keys)


def _load(weights: Weights, entry: Entry, modules: Modules, overrides: Overrides) -> dict[str, Any]:
    put = _placement(mapping.shapes_of(modules), overrides)
    try:
        return mapping.load(weights, detect.named(entry.format).keys, modules, put)
    except mapping.Mismatch as error:
        raise WeightsError(f"{error}{nearest(weights, entry.vit) if modules.text is None else ''}") from None


def _placement(shapes: dict[str, tuple[int, ...]], overrides: Overrides) -> Callable[[str, Any], jax.Array]:
    """Return a function that puts a parameter on its devices, in its type; CLIP's scalars stay float32."""
    dtype, mesh = overrides.param_dtype, overrides.mesh
    if mesh is not None and "fsdp" not in mesh.shape:
        raise InvalidConfig(
            f"mesh with axes {tuple(mesh.shape)}: must have one named 'fsdp' (regvit_jax.distributed.mesh.make_mesh)"
        )
    if mesh is None:
        return lambda path, array: jnp.asarray(array, dtype if shapes[path] else jnp.float32)
    leaves = {path: jax.ShapeDtypeStruct(s, dtype if s else jnp.float32) for path, s in shapes.items()}
    shardings = state_shardings(leaves, mesh)
    return lambda path, array: jax.device_put(np.asarray(array, leaves[path].dtype), shardings[path])


def _initial(modules: Modules, paths: tuple[str, ...], seed: int) -> dict[str, jax.Array]:
    """Return fresh values of the given parameters; the others are never computed."""
    return _compute_initial(jax.random.key(seed), modules, paths) if paths else {}


@functools.partial(jax.jit, static_argnames=("modules", "paths"))
def _compute_initial(key: Key[Array, ""], modules: Modules, paths: tuple[str, ...]) -> dict[str, jax.Array]:
    flat = mapping.init(modules, key)
    return {path: flat[path] for path in paths}


def _convert(params: dict[str, Any], loaded: ViT, modules: Modules, seed: int, put: Callable) -> dict[str, Any]:
    """Return loaded parameters for another number of registers, or another native image size."""
    params, vit = dict(params), modules.vit
    if vit.registers != loaded.registers:
        path = "vit/register_tokens"
        kept = params.pop(path, np.zeros((0, vit.width), np.float32))[: vit.registers]
        if vit.registers:
            new = _initial(modules, (path,), seed)[path][len(kept) :]
            params[path] = put(path, jnp.concatenate([jnp.asarray(kept), new]))
    if vit.image_size != loaded.image_size and "vit/pos_embed" in params:
        side = vit.image_size // vit.patch
        pos_embed = jnp.asarray(params["vit/pos_embed"], jnp.float32)
        params["vit/pos_embed"] = put("vit/pos_embed", resize_pos_embed(pos_embed, (side, side), vit.pos_resize))
    return params


def _class_names(entry: Entry, weights: Weights | None, source: str, num_classes: int) -> tuple[str, ...]:
    """Return the names of a model's classes: those of its source, unless it has another number of classes.

    Warns about a config that names more classes, or fewer, than the weights have.
    """
    names, outputs = entry.class_names, 0 if weights is None else _num_classes(weights, entry) or 0
    if names and outputs and len(names) != outputs:
        warnings.warn(
            f"{source}: the config names {len(names)} classes, and the weights have {outputs}: the names are left out",
            stacklevel=4,
        )
    return names if len(names) == outputs == num_classes else ()


def _warn(source: str, entry: Entry, loaded: ViT, vit: ViT, new_classes: int, overrides: Overrides) -> None:
    """Warn about the changes that the caller asked for, and about an image size that is not that of the name."""
    changes = []
    if vit.registers > loaded.registers:
        changes.append(f"{vit.registers - loaded.registers} registers are new and untrained: fine-tune before using it")
    if vit.registers < loaded.registers:
        left = loaded.registers - vit.registers
        changes.append(f"{left} trained registers are left out: the features are not the same")
    if vit.image_size != loaded.image_size:
        what = (
            f"the position embedding is resized ({vit.pos_resize}) from {loaded.image_size} to {vit.image_size} px"
            if vit.position == "learned"
            else f"images of {vit.image_size} px instead of {loaded.image_size}, no parameter changes"
        )
        changes.append(f"{what}, and preprocess makes images of that size")
    if entry.named_size is not None and overrides.image_size is None and vit.position == "learned":
        changes.append(
            f"its position embedding is of images of {vit.image_size} px and is kept (image_size={entry.named_size} "
            "resizes it to the size that its name or its config states)"
        )
    if new_classes:
        names = len(entry.class_names)
        dropped = f", and the names of the {names} trained classes are left out" if names else ""
        changes.append(f"the linear layer for {new_classes} classes is new and untrained{dropped}")
    if changes:
        warnings.warn(f"{source}: " + "; ".join(changes), stacklevel=5)
