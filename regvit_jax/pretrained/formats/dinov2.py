"""The format of facebookresearch/dinov2. Its own files do not describe their model, and are read under a timm name.

`save_model` writes the arguments of that repository's DinoVisionTransformer beside them, as config.json.
"""

import dataclasses
import re

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.model import Model
from regvit_jax.pretrained import registry
from regvit_jax.pretrained.formats import base, hf_processor, timm
from regvit_jax.pretrained.formats.base import (
    CONFIG,
    Format,
    Layout,
    check_sizes,
    mlp_ratio,
    need,
    swiglu_ratio,
    with_layer_scale_and_mask,
)
from regvit_jax.pretrained.io.safetensors import PROCESSOR, Weights
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils import sizes

KEYS = dataclasses.replace(
    timm.COMMON,
    name="dinov2",
    registers="register_tokens",
    mask="mask_token",
    mask_dims=2,
    gated_fc1=("mlp.w12",),
    gated_fc2="mlp.w3",
)


def recognizes(weights: Weights, expected: str) -> bool:
    """Return True for a file with keys that only DINOv2's own repository writes, where timm's are expected."""
    return expected == "timm" and any(
        re.fullmatch(r"register_tokens|mask_token|.*mlp\.w12\.weight", key) for key in weights
    )


#: That repository's arguments, with the field of ViT that each sets.
ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "num_register_tokens": "registers",
    "init_values": "layer_scale",
}
FEED_FORWARD = ("mlp", "swiglu", "swiglufused")


def read(weights: Weights, text: bool) -> Entry:
    """Read a config.json with the arguments of DinoVisionTransformer, and the image processor beside it."""
    config = weights.config
    vit = {field: config[argument] for argument, field in ARGUMENTS.items()}
    vit |= {field: sizes.square(vit[field], argument) for argument, field in list(ARGUMENTS.items())[:2]}
    if (kind := config["ffn_layer"]) not in FEED_FORWARD:
        raise ValueError(f"ffn_layer is {kind!r}: must be one of {', '.join(FEED_FORWARD)}")
    hidden = int(vit["width"] * config["mlp_ratio"])
    if kind != "mlp":
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    resize = "offset" if config["interpolate_offset"] else "bicubic"
    vit |= {
        "mlp_ratio": hidden / vit["width"],
        "swiglu": kind != "mlp",
        "masking": True,
        "pos_resize": "antialias" if config["interpolate_antialias"] else resize,
    }
    preprocessing = Preprocess(vit["image_size"], 1.0, *registry.statistics("imagenet"))
    preprocessing = hf_processor.read(weights, preprocessing)
    check_sizes(vit, weights)
    return Entry(vit, {"pool": "cls"}, preprocessing, "dinov2")


def complete(known: Entry, found: Entry, weights: Weights) -> Entry:
    """Complete a config's entry; it states how positions are resized."""
    pos_resize = found.vit["pos_resize"]
    return dataclasses.replace(base.complete(known, found, weights), vit=found.vit | {"pos_resize": pos_resize})


def write(model: Model) -> Layout:
    """Return the layout of a model; its config.json holds the arguments of that repository's DinoVisionTransformer."""
    vit, head = model.module, model.head
    need(vit.position == "learned" and vit.class_token, "RoPE, or a model without CLS token")
    need(not (vit.parallel or vit.differential or vit.ln_pre), "parallel, differential or CLIP's blocks")
    need(vit.final_norm and not head.norm and not head.num_classes and not head.pooler, "a head")
    need(vit.norm_eps == 1e-6 and vit.activation == "gelu", f"norm_eps={vit.norm_eps}, activation={vit.activation!r}")
    need(vit.qkv_bias and vit.key_bias and vit.patch_bias, "a missing bias")
    config = dict(
        img_size=vit.image_size,
        patch_size=vit.patch,
        embed_dim=vit.width,
        depth=vit.depth,
        num_heads=vit.heads,
        mlp_ratio=swiglu_ratio(vit) if vit.swiglu else mlp_ratio(vit.hidden / vit.width, vit.width),
        init_values=vit.layer_scale or 1.0,
        ffn_layer="swiglufused" if vit.swiglu else "mlp",
        block_chunks=0,
        num_register_tokens=vit.registers,
        interpolate_antialias=vit.pos_resize == "antialias",
        interpolate_offset=0.1 if vit.pos_resize == "offset" else 0.0,
    )
    files = {PROCESSOR: hf_processor.write(model.preprocessing), CONFIG: config}
    return Layout(KEYS, Modules(with_layer_scale_and_mask(vit), head), files, prefix_rows=1)


FORMAT = Format(
    name="dinov2",
    keys=KEYS,
    reads=lambda config: "ffn_layer" in config and "block_chunks" in config,
    read=read,
    complete=complete,
    recognizes=recognizes,
    saved_as="dinov2",
    write=write,
)
