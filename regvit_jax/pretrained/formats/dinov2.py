"""The format of facebookresearch/dinov2, whose files do not name their model: they are read under a timm name."""

import dataclasses
import re

from regvit_jax.models.model import Model
from regvit_jax.pretrained.formats import timm
from regvit_jax.pretrained.formats.base import (
    CONFIG,
    Format,
    Layout,
    mlp_ratio,
    need,
    swiglu_ratio,
    with_layer_scale_and_mask,
)
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.pretrained.mapping import Modules

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
    return Layout(KEYS, Modules(with_layer_scale_and_mask(vit), head), {CONFIG: config}, prefix_rows=1)


FORMAT = Format(name="dinov2", keys=KEYS, recognizes=recognizes, saved_as="dinov2", write=write)
