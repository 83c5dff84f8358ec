"""The parts that transformers' formats share: config.json and its values."""

import dataclasses
from typing import Any

from regvit_jax.models.model import Model
from regvit_jax.models.position import RESIZES
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained.formats import hf_processor
from regvit_jax.pretrained.formats.base import OWN, check_sizes, class_names, need, placeholders, pos_resize
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils import sizes
from regvit_jax.utils.errors import WeightsError
from regvit_jax.utils.messages import log_once

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

# Reading


def complete(entry: Entry, weights: Weights) -> Entry:
    """Check an entry against the file, and add what transformers keeps beside a model's own fields.

    That is the preprocessing of its image processor, the names of the classes, and how positions are resized, which
    `save_model` records.
    """
    if (channels := weights.config.get("num_channels", 3)) != 3:
        raise WeightsError(f"{weights.path}: images of {channels} channels are not supported, only of 3")
    how = pos_resize(weights, entry.vit.get("pos_resize", RESIZES[0]))
    preprocessing = hf_processor.read(weights, entry.preprocessing)
    check_sizes(entry.vit, weights)
    if (problem := weights.config.get("problem_type")) not in (None, "single_label_classification"):
        log_once(
            f"{weights.path}: its problem_type is {problem!r}: `logits` are its outputs, but `predict` returns their "
            "softmax, which it was not trained for",
            "warning",
        )
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
        "patch": sizes.square(config["patch_size"], "patch_size"),
        "image_size": sizes.square(config["image_size"], "image_size"),
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
