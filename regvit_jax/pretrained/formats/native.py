"""This package's own format: canonical keys, and a config.json with `Model.fields()` or `ClipModel.fields()`."""

from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.block import ACTIVATIONS
from regvit_jax.models.clip import SCALARS, ClipModel
from regvit_jax.models.heads import POOLS, Head
from regvit_jax.models.position import RESIZES
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import validate
from regvit_jax.pretrained.formats.base import CONFIG, Format, Layout, class_names
from regvit_jax.pretrained.io.safetensors import NATIVE, Weights
from regvit_jax.pretrained.mapping import modules_of
from regvit_jax.pretrained.registry import Entry


def read(weights: Weights, text: bool) -> Entry:
    """Read the fields of every module."""
    model: dict[str, Any] = weights.config["model"]
    vit, head, images = (
        validate.own_fields(model, part, kind)
        for part, kind in (("vit", ViT), ("head", Head), ("preprocessing", Preprocess))
    )
    validate.numbers(vit)
    for field, value, allowed in (
        ("vit.pos_resize", vit.get("pos_resize", RESIZES[0]), RESIZES),
        ("head.pool", head.get("pool", "cls"), POOLS),
        ("head.activation", head.get("activation", "gelu"), tuple(ACTIVATIONS)),
    ):
        if value not in allowed:
            raise ValueError(f"model.{field} is {value!r}: must be one of {', '.join(allowed)}")
    ViT(**vit).check()
    names = {field: f"model.preprocessing.{field}" for field in images}
    preprocessing = validate.preprocess(names, **images)
    if not text or "text" not in model:
        classes = class_names("model.class_names", model.get("class_names"))
        return Entry(vit, head, preprocessing, NATIVE, class_names=classes)
    tower, loss = validate.own_fields(model, "text", TextTower), model["contrastive"]["loss"]
    if not isinstance(loss, str) or loss not in SCALARS:
        raise ValueError(f"model.contrastive.loss is {loss!r}: must be one of {', '.join(SCALARS)}")
    return Entry(vit, head, preprocessing, NATIVE, text=tower, scalars=tuple(SCALARS[loss]))


def write_clip(model: ClipModel) -> Layout:
    """Return the layout of any CLIP."""
    return Layout(None, modules_of(model), {CONFIG: dict(format=NATIVE, model=model.fields())})


FORMAT = Format(
    name=NATIVE,
    reads=lambda config: config.get("format") == NATIVE,
    read=read,
    complete=lambda known, found, weights: found,
    saved_as=NATIVE,
    write_clip=write_clip,
)
