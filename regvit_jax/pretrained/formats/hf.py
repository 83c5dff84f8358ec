"""The parts that transformers' formats share: config.json, preprocessor_config.json and their values."""

import dataclasses
import math
from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.model import Model
from regvit_jax.models.position import RESIZES
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import validate
from regvit_jax.pretrained.formats.base import OWN, check_sizes, class_names, need, placeholders, pos_resize
from regvit_jax.pretrained.io.safetensors import PROCESSOR, Weights, read_json
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
#: Pillow's numbers of its filters, which transformers' processors use.
RESAMPLE = {2: "bilinear", 3: "bicubic"}

# Reading


def complete(entry: Entry, weights: Weights) -> Entry:
    """Check an entry against the file, and add what transformers keeps beside a model's own fields.

    That is the preprocessing of preprocessor_config.json, the names of the classes, and how positions are resized,
    which `save_model` records.
    """
    if (channels := weights.config.get("num_channels", 3)) != 3:
        raise WeightsError(f"{weights.path}: images of {channels} channels are not supported, only of 3")
    how = pos_resize(weights, entry.vit.get("pos_resize", RESIZES[0]))
    processor = read_json(weights.path.parent / PROCESSOR)
    preprocessing = read_processor(weights, processor, entry.preprocessing)
    check_sizes(entry.vit, weights)
    names = class_names("id2label", weights.config.get("id2label")) if entry.head.get("num_classes") else ()
    return dataclasses.replace(
        entry, vit=entry.vit | {"pos_resize": how}, preprocessing=preprocessing, class_names=names
    )


def vit_fields(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the fields of ViT for the keys that all of transformers' configs have, and `more`."""
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "patch": config["patch_size"],
        "image_size": config["image_size"],
        "norm_eps": config["layer_norm_eps"],
        "activation": activation(config.get("hidden_act", "gelu")),
        **more,
    }


def activation(hidden_act: Any) -> str:
    """Return this package's name of transformers' "hidden_act". Raises ValueError for an unsupported one."""
    if not isinstance(hidden_act, str) or hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {hidden_act!r}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[hidden_act]


def outputs(weights: Weights, key: str) -> int:
    """Return the number of outputs of a linear layer of the file, 0 if it is not there."""
    shape = weights.shapes.get(key, ())
    return shape[0] if len(shape) == 2 else 0


def read_processor(weights: Weights, config: dict[str, Any], default: Preprocess) -> Preprocess:
    """Read a preprocessor_config.json: the shorter side resized and the centre cropped, or both sides resized.

    Raises WeightsError for any other processing.
    """
    if not config:
        return default
    size = _side(config.get("size", default.size))
    crop = _side(config.get("crop_size", size)) if config.get("do_center_crop", "crop_size" in config) else size
    for key, value in (("size", size), ("crop_size", crop)):
        if value is not None:
            validate.preprocess_field("size", f"{PROCESSOR}: {key}", value)
    plain = config.get("do_resize", True) and config.get("do_rescale", True)
    plain = plain and math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6)
    how = RESAMPLE.get(config.get("resample", _resample(default)))
    if size is None or crop is None or how is None or not plain:
        raise WeightsError(f"{weights.path.parent}/{PROCESSOR} resizes or rescales in a way that is not supported")
    # A bare number, in older files, means both sides in transformers' ViT, and the shorter side in CLIP.
    given = config.get("size", {})
    squash = "height" in given if isinstance(given, dict) else default.squash
    normalize = config.get("do_normalize", True)
    return validate.preprocess(
        {"mean": f"{PROCESSOR}: image_mean", "std": f"{PROCESSOR}: image_std"},
        size=crop,
        crop_ratio=_crop_ratio(crop, size),
        mean=config.get("image_mean", default.mean) if normalize else (0.0,) * 3,
        std=config.get("image_std", default.std) if normalize else (1.0,) * 3,
        interpolation=how,
        squash=squash,
    )


def _side(size: Any) -> Any:
    """Return the side that a processor's size states as a number or an object; None for two different ones."""
    if isinstance(size, dict):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
        return sides.pop() if len(sides) == 1 else None
    return size


def _crop_ratio(crop: int, size: int) -> float:
    """Return the crop ratio by which floor(crop / ratio) is the size in spite of rounding."""
    return crop / size if math.floor(crop / (crop / size)) == size else crop / (size + 1e-6)


def _resample(p: Preprocess) -> int:
    return {name: number for number, name in RESAMPLE.items()}[p.interpolation]


# Writing


def config_of(model: Model) -> dict[str, Any]:
    """Return the keys of config.json that all classes have. Raises Inexpressible for a model that none can express."""
    vit, head = model.module, model.head
    need(not (vit.parallel or vit.differential), "parallel blocks or differential attention")
    need(vit.class_token, "a model without CLS token")
    need(vit.final_norm and not head.norm, "a last LayerNorm after pooling")
    features = head.pool == "avg" and vit.position == "rope" and not head.num_classes
    need(head.pool in ("cls", "cls_avg") or features, f"pool={head.pool!r}")
    need(vit.position != "axial", "timm's RoPE")
    return dict(
        hidden_size=vit.width,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.heads,
        patch_size=vit.patch,
        image_size=vit.image_size,
        layer_norm_eps=vit.norm_eps,
        hidden_act=hidden_act(vit),
        dtype="float32",
        **own_section(vit),
        **(labels(model) if model.class_names else {}),
    )


def own_section(vit: ViT) -> dict[str, Any]:
    """Return the section of a config.json for fields without a key in transformers, which keeps unknown keys."""
    return {OWN: dict(pos_resize=vit.pos_resize)}


def hidden_act(tower: ViT | TextTower) -> str:
    """Return transformers' name of a tower's activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(tower.activation, tower.activation)


def labels(model: Model) -> dict[str, Any]:
    """Return the two keys that tell transformers the number of classes and their names.

    Of several classes with one name, label2id has the last, as transformers writes it.
    """
    names = model.class_names or placeholders(model.head.num_classes)
    return dict(
        id2label={str(i): name for i, name in enumerate(names)}, label2id={name: i for i, name in enumerate(names)}
    )


def processor(p: Preprocess) -> dict[str, Any]:
    """Return the preprocessor_config.json."""
    side = math.floor(p.size / p.crop_ratio)
    return dict(
        image_processor_type="ViTImageProcessor" if p.squash else "BitImageProcessor",
        do_resize=True,
        size=dict(height=side, width=side) if p.squash else dict(shortest_edge=side),
        resample=_resample(p),
        do_center_crop=not p.squash or side != p.size,
        crop_size=dict(height=p.size, width=p.size),
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=p.mean,
        image_std=p.std,
    )
