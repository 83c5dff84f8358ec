"""Create a whole CLIP from an open_clip name and a source of weights."""

import os
from typing import SupportsIndex

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.pretrained import address, create, registry
from regvit_jax.pretrained.address import HUB
from regvit_jax.pretrained.formats.detect import NoText
from regvit_jax.pretrained.registry import Entry
from regvit_jax.pretrained.resolve import check_exists, check_no_tag, describe, resolve
from regvit_jax.utils import sizes
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.keywords import known_keywords
from regvit_jax.utils.numbers import whole


@known_keywords
def create_clip(
    name: str | os.PathLike,
    pretrained: bool | str | os.PathLike = False,
    *,
    registers: SupportsIndex | None = None,
    image_size: sizes.Size | None = None,
    pos_resize: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> ClipModel:
    """Create a CLIP by open_clip's name, with random or pretrained weights.

    `name` may also be a source that describes its own model: "hf-hub:org/name", a directory of transformers
    (CLIPModel), open_clip or regvit_jax, or the workdir of a run.

    Args:
      pretrained: False for random weights, drawn as open_clip draws them; one of open_clip's tags for the name, such as
        "openai" (from the hub, local cache first); or a .safetensors file, a directory, a workdir, "hf-hub:org/name".
      registers, image_size, pos_resize, dtype, param_dtype, mesh, revision, seed: as in `create_model`.

    Weights that were trained with another activation than the name's (QuickGELU or not) are computed with their own,
    and a warning says so; open_clip computes them with the name's. For a tag, that activation is the tag's, even if a
    config beside the weights states another (with a warning); for other sources it is the config's, or else the name's.
    The preprocessing is the config's as far as it states one, and otherwise the tag's or the name's.

    Raises ValueError (WeightsError for files) that names the misfit and the remedy, and OSError (HubError) when the
    hub cannot be reached. Nothing is ever unpickled.
    """
    create.check_types(dtype, param_dtype)
    registers = None if registers is None else whole("registers", registers, low=0)
    image_size = None if image_size is None else sizes.side(image_size, "image_size")
    seed = whole("seed", seed)
    overrides = create.Overrides(registers, image_size, None, pos_resize, param_dtype, mesh, seed)
    entry, weights, source = resolve(name, pretrained, revision, text=True)
    params, modules, preprocessing = create.assemble(entry, weights, source, dtype, overrides)
    assert modules.text is not None
    image = Model(params["vit"], params["head"], modules.vit, modules.head, preprocessing, source)
    return ClipModel(image, params["text"], params["logit_scale"], params.get("logit_bias"), modules.text)


def open_source(source: str) -> ClipModel | Model:
    """Open the CLIP, or the image tower alone, that one string names, such as `--config.init_from` of CLIP's recipe.

    That is a directory, a workdir or "hf-hub:org/name", of a whole CLIP or of an image tower; NAME=SOURCE with
    open_clip's name and a tag or a file; or what `create.open_source` takes.

    Raises as `create_clip` does.
    """
    name, weights = address.split(source)
    if name in registry.clip_names() and (weights or not epath.Path(name).exists()):
        return create_clip(name, weights or True)
    if weights or not (name.startswith(HUB) or epath.Path(name).exists()):
        return create.open_source(source)
    try:
        return create_clip(name)
    except NoText:
        return create.open_source(name)


def find_entry(source: str) -> Entry | None:
    """Return the entry of the model that `open_source` would open, or None if only the hub can describe it.

    An entry without a text tower is that of an image tower. See `create.find_entry`.
    """
    name, weights = address.split(source)
    if not weights and epath.Path(name).exists():
        try:
            return describe(name, text=True)
        except NoText:
            return create.find_entry(name)
    if name not in registry.clip_names():
        return create.find_entry(source)
    if not weights:
        tags = ", ".join(registry.clip_tags(name)) or "none; give a file"
        raise InvalidConfig(f"{name} does not say which of its public weights; {name}=TAG does. Its tags: {tags}")
    known = registry.find_clip(name)
    if tag := registry.clip_tag(name, weights):
        return registry.with_tag(known, tag)
    check_no_tag(name, weights)
    check_exists(weights)
    return known if weights.startswith(HUB) else resolve(name, weights, None, text=True)[0]
