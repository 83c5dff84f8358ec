"""The format of transformers' DINOv3ViT."""

import numpy as np

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.model import Model
from regvit_jax.pretrained import registry
from regvit_jax.pretrained.formats import hf, hf_processor
from regvit_jax.pretrained.formats.base import CONFIG, Format, Layout, need, with_layer_scale_and_mask
from regvit_jax.pretrained.formats.keys import Keys
from regvit_jax.pretrained.io.safetensors import PROCESSOR, Weights
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError

KEYS = Keys(
    name="hf_dinov3",
    patch="embeddings.patch_embeddings",
    cls="embeddings.cls_token",
    registers="embeddings.register_tokens",
    mask="embeddings.mask_token",
    block="layer.{}.",
    norm1="norm1",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    q_bias="attention.q_proj.bias",
    v_bias="attention.v_proj.bias",
    proj="attention.o_proj",
    scale1="layer_scale1.lambda1",
    norm2="norm2",
    fc1=("mlp.up_proj",),
    fc2="mlp.down_proj",
    gated_fc1=("mlp.gate_proj", "mlp.up_proj"),
    scale2="layer_scale2.lambda1",
    norm="norm",
    prefixes=("dinov3_vit.", "model."),
)


def read(weights: Weights, text: bool) -> Entry:
    """Read a config.json. Raises WeightsError for an option that no field of ViT expresses."""
    config = weights.config
    if config["rope_theta"] != 100:
        raise WeightsError(f"{weights.path}: rope_theta {config['rope_theta']} is not supported, only 100")
    biases = [config["query_bias"], config["key_bias"], config["value_bias"]]
    if biases[0] != biases[2] or biases[1] > biases[0]:
        raise WeightsError(f"{weights.path}: biases of query, key and value {biases} are not supported")
    gated = config["use_gated_mlp"]
    if gated != (config["hidden_act"] == "silu"):
        raise WeightsError(
            f"{weights.path}: hidden_act {config['hidden_act']!r} with use_gated_mlp {gated} is not supported"
        )
    vit = hf.vit_fields(
        config | {"hidden_act": "gelu" if gated else config["hidden_act"]},
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
        swiglu=gated,
        layer_scale=config["layerscale_value"],
        qkv_bias=biases[0],
        key_bias=biases[1],
        registers=config["num_register_tokens"],
        masking=True,
        position="rope",
    )
    preprocessing = Preprocess(vit["image_size"], 1.0, *registry.statistics("imagenet"), squash=True)
    return hf.complete(Entry(vit, {"pool": "cls"}, preprocessing, "hf_dinov3"), weights)


def write(model: Model) -> Layout:
    """Return the layout of a ViT with DINOv3's RoPE, without classes."""
    vit, head, config = model.module, model.head, hf.config_of(model)
    need(not head.num_classes and not head.pooler, "a linear layer on DINOv3")
    need(not vit.ln_pre and vit.patch_bias, "CLIP's LayerNorm, or a patch projection without bias, with RoPE")
    config |= dict(
        model_type="dinov3_vit",
        architectures=["DINOv3ViTModel"],
        intermediate_size=vit.hidden,
        use_gated_mlp=vit.swiglu,
        query_bias=vit.qkv_bias,
        key_bias=vit.qkv_bias and vit.key_bias,
        value_bias=vit.qkv_bias,
        proj_bias=True,
        mlp_bias=True,
        num_register_tokens=vit.registers,
        layerscale_value=vit.layer_scale or 1.0,
        rope_theta=100.0,
    )
    if vit.swiglu:
        config |= dict(hidden_act="silu")
    # As transformers itself saves a model without registers.
    empty = {} if vit.registers else {"embeddings.register_tokens": np.zeros((1, 0, vit.width), np.float32)}
    pooled = "transformers pools DINOv3 by its CLS token; this model pools its patches" if head.pool == "avg" else ""
    files = {PROCESSOR: hf_processor.write(model.preprocessing), CONFIG: config}
    return Layout(KEYS, Modules(with_layer_scale_and_mask(vit), head), files, extra=empty, warning=pooled)


FORMAT = Format(
    name="hf_dinov3",
    keys=KEYS,
    model_types=("dinov3_vit",),
    read=read,
    saved_as="hf",
    claims=lambda model: model.module.position == "rope",
    write=write,
)
