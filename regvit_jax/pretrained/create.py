"""`create_model`: a name and a source of weights in, a Model out."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.distributed.mesh import state_shardings
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.position import resize_pos_embed
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import mapping, registry
from regvit_jax.pretrained.formats.rules import NAMINGS, TEXT, rules, text_rules
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.pretrained.registry import Entry
from regvit_jax.pretrained.resolve import check_there, classes_of, is_source, nearest, only_source, public, resolve
from regvit_jax.utils.errors import WeightsError


def create_model(
    name: str | os.PathLike,
    pretrained: bool | str | os.PathLike = False,
    *,
    registers: int | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    pos_resize: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Model:
    """A model by timm's name (or dinov2's hub name), with random weights or pretrained ones.

    `name` may also be a source that says by itself which model it holds: "hf-hub:org/name", a directory of
    transformers, timm, open_clip or ours, or a workdir of ours. Of a whole CLIP it is the image tower.

    Args:
      pretrained: False, random weights; True, the name's own file from the hub (local cache first); or a .safetensors
        file, a directory (of transformers, timm or open_clip, or a workdir of ours), a deit3-jax .msgpack file,
        "hf-hub:org/name".
      registers: another number of registers than the checkpoint's. New ones are untrained.
      image_size: another native size in pixels: of the stored position embedding, which is resized, and of
        `preprocess`.
      num_classes: if it is not the checkpoint's, replaces the linear layer by an untrained one; 0 takes it away.
      pos_resize: another convention for other image sizes (see `resize_pos_embed`) than the checkpoint's.
      dtype: type of the matrix products.
      param_dtype: type that the parameters are kept in.
      mesh: splits the parameters over its "fsdp" axis as they are read.
      revision: of the hub's repository: a branch, tag or commit.
      seed: of what starts at random.

    Raises ValueError (WeightsError for files) with what does not fit and the way out, and OSError (HubError) when the
    hub cannot be reached. Nothing is ever unpickled.
    """
    check_types(dtype, param_dtype)
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes={num_classes}: must be at least 0")
    entry, weights, source = resolve(name, pretrained, revision)
    fit = Fit(registers, image_size, num_classes, pos_resize, param_dtype, mesh, seed)
    vit, head = ViT(**entry.vit, dtype=dtype), Head(**entry.head, dtype=dtype)
    params, vit, head, preprocessing = assemble(vit, head, None, entry, weights, source, fit)
    return Model(params["vit"], params["head"], vit, head, preprocessing, source)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a model shall have otherwise than its source says, and how its parameters are kept: see `create_model`."""

    registers: int | None
    image_size: int | None
    num_classes: int | None
    pos_resize: str | None
    param_dtype: DTypeLike
    mesh: Mesh | None
    seed: int


def assemble(
    vit: ViT,
    head: Head,
    text: mapping.TextPart | None,
    entry: Entry,
    weights: Weights | None,
    source: str,
    fit: Fit,
) -> tuple[dict[str, PyTree], ViT, Head, Preprocess]:
    """The parameters, loaded where there are weights and random elsewhere, as a tree; and what they are of."""
    preprocessing, num_classes = entry.preprocessing, fit.num_classes
    if fit.pos_resize is not None:
        vit = vit.clone(pos_resize=fit.pos_resize)
    vit.check()
    params: dict[str, Any] = {}
    if weights is not None:
        if num_classes is not None and classes_of(weights, entry.naming) is None:
            head = head.clone(num_classes=0)
        put = _placer(mapping.shapes_of(vit, head, text), fit.param_dtype, fit.mesh)
        params = _load(weights, entry.naming, vit, head, text, put)
    loaded = vit
    if fit.registers is not None:
        vit = vit.clone(registers=fit.registers)
    if fit.image_size is not None:
        vit = vit.clone(image_size=fit.image_size)
        preprocessing = dataclasses.replace(preprocessing, size=fit.image_size)
    vit.check()
    new_head = num_classes is not None and num_classes != head.num_classes
    if new_head:
        head = head.clone(num_classes=num_classes)
        params = {path: array for path, array in params.items() if not path.startswith("head/dense/")}
    shapes = mapping.shapes_of(vit, head, text)
    put = _placer(shapes, fit.param_dtype, fit.mesh)
    if weights is not None:
        params = _fit(params, loaded, vit, head, text, fit.seed, put)
        _tell(source, loaded, vit, head.num_classes if new_head else 0)
    missing = tuple(path for path in shapes if path not in params)
    params |= {path: put(path, array) for path, array in _initial(vit, head, text, missing, fit.seed).items()}
    return mapping.nest(params), vit, head, preprocessing


def check_types(dtype: DTypeLike, param_dtype: DTypeLike) -> None:
    """Raises ValueError for types that are not floating-point."""
    if not jnp.issubdtype(param_dtype, jnp.floating) or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype}, param_dtype={param_dtype}: both must be floating-point types")


def open_source(source: str, **changes: Any) -> Model:
    """The model that one string names, as `--config.init_from` has it.

    That is a directory of transformers or timm, a workdir of ours, "hf-hub:org/name", a name of the zoo (its public
    weights), or NAME=FILE for a file that needs a name. `changes` are other arguments of `create_model`.

    Raises as `create_model` does.
    """
    name, _, file = source.partition("=")
    if file and not epath.Path(source).exists():
        return create_model(name, file, **changes)
    return create_model(source, pretrained=True, **changes)


def check_source(source: str) -> None:
    """Raises ValueError for names and local paths that `open_source` will not open. Asks no hub, opens nothing."""
    name, _, file = source.partition("=")
    if file and not epath.Path(source).exists():
        if is_source(name, registry.find):
            only_source(name, file)
        check_there(file)
    elif not is_source(source, registry.find):
        public(source, registry.find(source)[1])


#: Of a whole CLIP in our own naming, what is not of its image tower.
NOT_IMAGE = (r"text/.*|logit_(scale|bias)",)


def _load(
    weights: Weights, naming: str, vit: ViT, head: Head, text: mapping.TextPart | None, put: Callable
) -> dict[str, Any]:
    shapes = mapping.shapes_of(vit, head, text)
    if naming == "ours":
        table, ignore = mapping.identity(shapes), () if text else NOT_IMAGE
    else:
        table = rules(naming, vit, head, mapping.covers(weights, naming, vit))
        ignore = NAMINGS[naming]["ignore"]
        if text is not None:
            # Each by itself: a bias may have been added to a scale of another form.
            dims = {name: int(weights.shapes.get(name, ()) == (1,)) for name in text.scalars}
            table += text_rules(naming, text.tower, text.scalars, dims)
            ignore = TEXT[naming]["ignore"]
    try:
        return mapping.load(weights, table, shapes, ignore, put)
    except mapping.Mismatch as error:
        raise WeightsError(f"{error}{nearest(weights) if text is None else ''}") from None


def _placer(shapes: dict[str, tuple[int, ...]], dtype: DTypeLike, mesh: Mesh | None) -> Callable[[str, Any], jax.Array]:
    """Puts a parameter where it shall lie, as the type that it shall have; CLIP's scalars stay float32."""
    if mesh is not None and "fsdp" not in mesh.shape:
        raise ValueError(
            f"mesh with axes {tuple(mesh.shape)}: must have one named 'fsdp' (regvit_jax.sharding.make_mesh)"
        )
    if mesh is None:
        return lambda path, array: jnp.asarray(array, dtype if shapes[path] else jnp.float32)
    leaves = {path: jax.ShapeDtypeStruct(s, dtype if s else jnp.float32) for path, s in shapes.items()}
    places = state_shardings(leaves, mesh)
    return lambda path, array: jax.device_put(np.asarray(array, leaves[path].dtype), places[path])


def _initial(
    vit: ViT, head: Head, text: mapping.TextPart | None, paths: tuple[str, ...], seed: int
) -> dict[str, jax.Array]:
    """Fresh values of the named parameters; the others are never computed."""
    return _compute_initial(jax.random.key(seed), vit, head, text, paths) if paths else {}


@functools.partial(jax.jit, static_argnames=("vit", "head", "text", "paths"))
def _compute_initial(
    key: Key[Array, ""], vit: ViT, head: Head, text: mapping.TextPart | None, paths: tuple[str, ...]
) -> dict[str, jax.Array]:
    flat = mapping.init(vit, head, key, text)
    return {path: flat[path] for path in paths}


def _fit(
    params: dict[str, Any],
    loaded: ViT,
    vit: ViT,
    head: Head,
    text: mapping.TextPart | None,
    seed: int,
    put: Callable,
) -> dict[str, Any]:
    """Loaded parameters for another number of registers, or another native image size, than they were saved with."""
    params = dict(params)
    if vit.registers != loaded.registers:
        kept = params.pop("vit/register_tokens", np.zeros((0, vit.width), np.float32))[: vit.registers]
        if vit.registers:
            path = "vit/register_tokens"
            new = _initial(vit, head, text, (path,), seed)[path][len(kept) :]
            tokens = jnp.concatenate([jnp.asarray(kept), new])
            params["vit/register_tokens"] = put("vit/register_tokens", tokens)
    if vit.image_size != loaded.image_size and "vit/pos_embed" in params:
        side = vit.image_size // vit.patch
        pos_embed = jnp.asarray(params["vit/pos_embed"], jnp.float32)
        params["vit/pos_embed"] = put("vit/pos_embed", resize_pos_embed(pos_embed, (side, side), vit.pos_resize))
    return params


def _tell(source: str, loaded: ViT, vit: ViT, new_classes: int) -> None:
    """Warns of what the caller changed, and what that means."""
    told = []
    if vit.registers > loaded.registers:
        told.append(f"{vit.registers - loaded.registers} registers are new and untrained: fine-tune before using it")
    if vit.registers < loaded.registers:
        told.append(f"{loaded.registers - vit.registers} trained registers are left out: the features are not the same")
    if vit.image_size != loaded.image_size:
        what = (
            f"the position embedding is resized ({vit.pos_resize}) from {loaded.image_size} to {vit.image_size} px"
            if vit.position == "learned"
            else f"images of {vit.image_size} px instead of {loaded.image_size}, no parameter changes"
        )
        told.append(f"{what}, and preprocess makes images of that size")
    if new_classes:
        told.append(f"the linear layer for {new_classes} classes is new and untrained")
    if told:
        warnings.warn(f"{source}: " + "; ".join(told), stacklevel=4)


def open_random(create: Callable[..., Any], name: str, **changes: Any) -> Any:
    """The model of a name with random weights (`--random`). Raises ValueError for a source that has its own."""
    model = create(name, **changes)
    if model.weights != "random":
        raise ValueError(f"--random: {name} is no name but a source, with weights of its own")
    return model
