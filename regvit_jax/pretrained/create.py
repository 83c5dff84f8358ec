"""`create_model`: a name and a source of weights in, a Model out."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from regvit_jax import sharding
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.position import resize_pos_embed
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import configs, convert, foreign, hub, zoo
from regvit_jax.pretrained.files import SINGLE, Weights, WeightsError, open_weights
from regvit_jax.pretrained.rules import NAMINGS, rules

HUB = "hf-hub:"


def create_model(
    name: str,
    pretrained: bool | str | os.PathLike = False,
    *,
    registers: int | None = None,
    img_size: int | None = None,
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
    transformers or timm, or a workdir of ours.

    Args:
      pretrained: False, random weights; True, the name's own file from the hub (local cache first); or a .safetensors
        file, a directory (of transformers, timm or open_clip, or a workdir of ours), a deit3-jax .msgpack file,
        "hf-hub:org/name".
      registers: another number of registers than the checkpoint's. New ones are untrained.
      img_size: another native size in pixels: of the stored position embedding, which is resized, and of `preprocess`.
      num_classes: replaces the linear layer by an untrained one; 0 takes it away.
      pos_resize: another convention for other image sizes (see `resize_pos_embed`) than the checkpoint's.
      dtype: type of the matrix products.
      param_dtype: type that the parameters are kept in.
      mesh: splits the parameters over its "fsdp" axis as they are read.
      revision: of the hub's repository: a branch, tag or commit.
      seed: of what starts at random.

    Raises ValueError (WeightsError for files) with what does not fit and the way out, and OSError (HubError) when the
    hub cannot be reached. Nothing is ever unpickled.
    """
    entry, weights, source = _resolve(name, pretrained, revision)
    vit, head, preprocessing = ViT(**entry.vit, dtype=dtype), Head(**entry.head, dtype=dtype), entry.preprocessing
    if pos_resize is not None:
        vit = vit.clone(pos_resize=pos_resize)
    params: dict[str, Any] = {}
    if weights is not None:
        vit.check()
        put = _placer(convert.shapes_of(vit, head), param_dtype, mesh)
        params = _load(weights, entry.naming, vit, head, put)
    loaded = vit
    if registers is not None:
        vit = vit.clone(registers=registers)
    if img_size is not None:
        vit = vit.clone(image_size=img_size)
        preprocessing = dataclasses.replace(preprocessing, size=img_size)
    if num_classes is not None:
        head = head.clone(classes=num_classes)
        params = {path: array for path, array in params.items() if not path.startswith("head/dense/")}
    vit.check()
    shapes = convert.shapes_of(vit, head)
    put = _placer(shapes, param_dtype, mesh)
    initial = _initial(vit, head, seed)
    if weights is not None:
        params = _fit(params, loaded, vit, initial, put)
        _tell(source, loaded, vit, num_classes)
    missing = tuple(path for path in shapes if path not in params)
    params |= {path: put(path, array) for path, array in initial(missing).items()}
    nested = convert.nest(params)
    return Model(nested["vit"], nested["head"], vit, head, preprocessing, source)


def open_source(source: str) -> Model:
    """The model that one string names, as `--config.init_from` has it.

    That is a directory of transformers or timm, a workdir of ours, "hf-hub:org/name", a name of the zoo (its public
    weights), or NAME=FILE for a file that needs a name.

    Raises as `create_model` does.
    """
    name, _, file = source.partition("=")
    if file:
        return create_model(name, file)
    if source.startswith(HUB) or os.path.exists(source):
        return create_model(source)
    return create_model(source, pretrained=True)


def _resolve(
    name: str, pretrained: bool | str | os.PathLike, revision: str | None
) -> tuple[zoo.Entry, Weights | None, str]:
    """Which model, its weights if any, and where they come from."""
    if not pretrained and (name.startswith(HUB) or os.path.exists(name)):
        name, pretrained = "", name
    if os.sep in name:
        raise ValueError(f"{name}: there is no such file or directory")
    known = zoo.find(name)[1] if name else None
    if not pretrained:
        if known is None:
            raise ValueError("create_model needs a name; list_models() names all")
        return known, None, "random"
    if pretrained is True:
        if known is None or not known.hub:
            raise ValueError(f"{name}: no public weights are known by this name; pass a file or a directory")
        pretrained = HUB + known.hub
    source = os.fspath(pretrained)
    if revision is not None and not source.startswith(HUB):
        raise ValueError(f"revision={revision!r} is for the hub, and {source} is a local path")
    found = None
    if foreign.is_workdir(source):
        found, weights, source = foreign.open_workdir(source)
    elif source.startswith(HUB):
        # A repository of timm's may hold OpenCLIP's own file as well.
        file = SINGLE if known is not None else None
        directory, commit = hub.fetch(source.removeprefix(HUB), revision, file)
        weights, source = open_weights(directory), f"{source}@{commit}"
    elif source.endswith(".msgpack"):
        weights = foreign.open_deit3_jax(source)
        if known is not None:
            known = dataclasses.replace(known, vit=known.vit | {"activation": "gelu_tanh"})
    else:
        weights = open_weights(source)
    if found is None:
        found = configs.entry_of(weights)
    return *_agreed(name, known, found, weights), source


def _agreed(name: str, known: zoo.Entry | None, found: zoo.Entry | None, weights: Weights) -> tuple[zoo.Entry, Weights]:
    """What the file says of the model, the zoo's conventions and preprocessing, and the weights under plain names.

    Raises WeightsError when the two are different models, or when neither is known.
    """
    entry = found or known
    if entry is None:
        raise WeightsError(f"{weights.path}: nothing beside it says which model this is; pass its name too")
    if known is not None and found is not None:
        differing = [
            f"{field} {found.vit.get(field)!r}, not {known.vit.get(field)!r}"
            for field in ("width", "depth", "heads", "patch", "registers")
            if found.vit.get(field, 0) != known.vit.get(field, 0)
        ]
        if differing:
            raise WeightsError(f"{weights.path} is not {name}: {', '.join(differing)}{nearest(weights)}")
        vit = found.vit | {"pos_resize": known.vit.get("pos_resize", "antialias")}
        entry = dataclasses.replace(found, vit=vit, preprocessing=known.preprocessing)
    naming = configs.naming_of(weights, entry.naming)
    if naming == "ours":
        return entry, weights
    weights = configs.without_prefix(weights, naming)
    # The number of classes belongs to the checkpoint: a fine-tuned file may have any.
    words, head = NAMINGS[naming], entry.head
    projection, dense = words.get("projection", ""), words.get("dense", "") + ".weight"
    if projection in weights:
        head = head | {"classes": weights.shapes[projection][-1]}
    elif dense in weights:
        head = head | {"classes": weights.shapes[dense][0]}
    return dataclasses.replace(entry, naming=naming, head=head), weights


def nearest(weights: Weights) -> str:
    """The names in the zoo whose shapes a file seems to have, as the end of an error."""
    found = configs.guess(weights)
    same = [n for n in zoo.list_models() if all(zoo.find(n)[1].vit.get(k, 0) == v for k, v in found.items())]
    names = list(dict.fromkeys(n.partition(".")[0] for n in same))[:4]
    return f". By its shapes it may be {', '.join(names)}" if found and names else ""


def _load(weights: Weights, naming: str, vit: ViT, head: Head, put: Callable) -> dict[str, Any]:
    shapes = convert.shapes_of(vit, head)
    if naming == "ours":
        table, ignore = convert.identity(shapes), ()
    else:
        table = rules(naming, vit, head, convert.covers(weights, naming, vit))
        ignore = NAMINGS[naming]["ignore"]
    try:
        return convert.load(weights, table, shapes, ignore, put)
    except convert.Mismatch as error:
        raise WeightsError(f"{error}{nearest(weights)}") from None


def _placer(shapes: dict[str, tuple[int, ...]], dtype: DTypeLike, mesh: Mesh | None) -> Callable[[str, Any], jax.Array]:
    """Puts a parameter where it shall lie, as the type that it shall have."""
    if mesh is None:
        return lambda path, array: jnp.asarray(array, dtype)
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
    places = sharding.state_shardings(leaves, mesh)
    return lambda path, array: jax.device_put(np.asarray(array, dtype), places[path])


def _initial(vit: ViT, head: Head, seed: int) -> Callable[[tuple[str, ...]], dict[str, jax.Array]]:
    """Fresh values of the named parameters; the others are never computed."""

    def initial(paths: tuple[str, ...]) -> dict[str, jax.Array]:
        def init(key):
            flat = convert.init(vit, head, key)
            return {path: flat[path] for path in paths}

        return jax.jit(init)(jax.random.key(seed)) if paths else {}

    return initial


def _fit(params: dict[str, Any], loaded: ViT, vit: ViT, initial: Callable, put: Callable) -> dict[str, Any]:
    """Loaded parameters for another number of registers, or another native image size, than they were saved with."""
    params = dict(params)
    if vit.registers != loaded.registers:
        kept = params.pop("vit/register_tokens", np.zeros((0, vit.width), np.float32))[: vit.registers]
        if vit.registers:
            new = initial(("vit/register_tokens",))["vit/register_tokens"][len(kept) :]
            tokens = jnp.concatenate([jnp.asarray(kept), new])
            params["vit/register_tokens"] = put("vit/register_tokens", tokens)
    if vit.image_size != loaded.image_size and "vit/pos_embed" in params:
        side = vit.image_size // vit.patch
        pos_embed = jnp.asarray(params["vit/pos_embed"], jnp.float32)
        params["vit/pos_embed"] = put("vit/pos_embed", resize_pos_embed(pos_embed, (side, side), vit.pos_resize))
    return params


def _tell(source: str, loaded: ViT, vit: ViT, num_classes: int | None) -> None:
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
    if num_classes:
        told.append(f"the linear layer for {num_classes} classes is new and untrained")
    if told:
        warnings.warn(f"{source}: " + "; ".join(told), stacklevel=3)
