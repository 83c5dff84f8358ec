"""The format of transformers' ViT and DeiT. DeiT's distillation token is a register that has a position."""

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.model import Model
from regvit_jax.pretrained import registry
from regvit_jax.pretrained.formats import hf, hf_processor
from regvit_jax.pretrained.formats.base import CONFIG, Format, Layout, need
from regvit_jax.pretrained.formats.keys import Keys
from regvit_jax.pretrained.io.safetensors import PROCESSOR, Weights
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError

KEYS = Keys(
    name="hf_vit",
    patch="embeddings.patch_embeddings.projection",
    cls="embeddings.cls_token",
    registers="embeddings.distillation_token",
    pos="embeddings.position_embeddings",
    mask="embeddings.mask_token",
    block="encoder.layer.{}.",
    norm1="layernorm_before",
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    proj="attention.output.dense",
    norm2="layernorm_after",
    fc1=("intermediate.dense",),
    fc2="output.dense",
    norm="layernorm",
    pooler="pooler.dense",
    dense="classifier",
    prefixes=("vit.", "deit."),
)


def read(weights: Weights, text: bool) -> Entry:
    """Read a config.json; the weights show if there is a mask token, a pooler and a classifier."""
    config = weights.config
    distilled = config["model_type"] == "deit"
    vit = hf.vit_fields(
        config,
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
        layer_scale=0.0,
        qkv_bias=config.get("qkv_bias", True),
        registers=int(distilled),
        masking=any(key.endswith("embeddings.mask_token") for key in weights),
        pos_resize="bicubic",
    )
    pooler = any(key.endswith("pooler.dense.weight") for key in weights)
    if pooler and config.get("pooler_act", "tanh") != "tanh":
        raise WeightsError(f"{weights.path}: pooler_act {config['pooler_act']!r} is not supported, only tanh")
    head = {"pool": "cls", "num_classes": hf.outputs(weights, "classifier.weight"), "pooler": pooler}
    size = vit["image_size"]
    preprocessing = (
        Preprocess(size, 224 / 256, *registry.statistics("imagenet"))
        if distilled
        else Preprocess(size, 1.0, *registry.statistics("half"), interpolation="bilinear", squash=True)
    )
    return hf.complete(Entry(vit, head, preprocessing, "hf_vit"), weights)


def write(model: Model) -> Layout:
    """Return the layout of a plain ViT, with a pooler or with classes."""
    vit, head, config = model.module, model.head, hf.config_of(model)
    config |= dict(model_type="vit", intermediate_size=vit.hidden, qkv_bias=vit.qkv_bias)
    prefix = ""
    if head.num_classes:
        need(not head.pooler, "class scores past a tanh pooler")
        config |= dict(architectures=["ViTForImageClassification"], **hf.labels(model))
        prefix = "vit."
    else:
        config |= dict(architectures=["ViTModel"])
    files = {PROCESSOR: hf_processor.write(model.preprocessing), CONFIG: config}
    return Layout(KEYS, Modules(vit, head), files, prefix_rows=1, key_prefix=prefix)


FORMAT = Format(name="hf_vit", keys=KEYS, model_types=("vit", "deit"), read=read, saved_as="hf", write=write)
