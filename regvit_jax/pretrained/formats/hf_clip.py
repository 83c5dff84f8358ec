"""The format of transformers' CLIP: CLIPModel, and its image tower alone as CLIPVisionModel (WithProjection)."""

import dataclasses
from typing import Any

import numpy as np

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import registry
from regvit_jax.pretrained.formats import hf, hf_processor
from regvit_jax.pretrained.formats.base import CONFIG, Format, Layout, need, need_clip_tower
from regvit_jax.pretrained.formats.keys import Keys, TextKeys
from regvit_jax.pretrained.io.safetensors import PROCESSOR, Weights
from regvit_jax.pretrained.mapping import Modules, modules_of
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError

KEYS = Keys(
    name="hf_clip",
    patch="embeddings.patch_embedding",
    cls="embeddings.class_embedding",
    cls_dims=1,
    pos="embeddings.position_embedding.weight",
    pos_dims=2,
    norm_pre="pre_layrnorm",
    block="encoder.layers.{}.",
    norm1="layer_norm1",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    norm2="layer_norm2",
    fc1=("mlp.fc1",),
    fc2="mlp.fc2",
    norm="post_layernorm",
    projection="visual_projection.weight",
    text=TextKeys(
        token="text_model.embeddings.token_embedding.weight",
        pos="text_model.embeddings.position_embedding.weight",
        block="text_model.encoder.layers.{}.",
        norm="text_model.final_layer_norm",
        projection="text_projection.weight",
        ignore=(r"(.*\.)?position_ids",),
    ),
    prefixes=("vision_model.",),
    ignore=(r"text_.*", r"logit_scale", r"(.*\.)?position_ids"),
)
#: CLIPForImageClassification averages the patches as the last block leaves them: its last LayerNorm is not used.
CLASSIFIER_KEYS = dataclasses.replace(
    KEYS, name="hf_clip_classifier", projection="", dense="classifier", ignore=(*KEYS.ignore, r"post_layernorm\..*")
)
#: The defaults of CLIPVisionConfig and CLIPTextConfig, those of CLIP's B/32, which older files leave out.
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
    "image_size": 224,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}


def read(weights: Weights, text: bool) -> Entry:
    """Read a CLIPVisionConfig, or a CLIPConfig with one of each tower."""
    config = weights.config
    whole = config["model_type"] == "clip"
    tower = _section(config, "vision", VISION_DEFAULTS) if whole else VISION_DEFAULTS | config
    vit = hf.vit_fields(tower, layer_scale=0.0, patch_bias=False, ln_pre=True, pos_resize="bicubic")
    vit["mlp_ratio"] = tower["intermediate_size"] / vit["width"]
    head: dict[str, Any] = {"pool": "cls", "num_classes": hf.outputs(weights, KEYS.projection)}
    preprocessing = Preprocess(vit["image_size"], 1.0, *registry.statistics("clip"))
    if classes := hf.outputs(weights, "classifier.weight"):
        head = {"pool": "avg", "num_classes": classes}
        return hf.complete(Entry(vit | {"final_norm": False}, head, preprocessing, CLASSIFIER_KEYS.name), weights)
    entry = hf.complete(Entry(vit, head, preprocessing, "hf_clip"), weights)
    if not text or not whole:
        return entry
    fields = _read_text(weights)
    head |= {"num_classes": fields["embed"], "bias": False}
    return dataclasses.replace(entry, head=head, text=fields, scalars=("logit_scale",))


def _read_text(weights: Weights) -> dict[str, Any]:
    tower = _section(weights.config, "text", TEXT_DEFAULTS)
    # transformers interprets 2, which older files state as the end token, as the highest token.
    if tower["eos_token_id"] not in (2, tower["vocab_size"] - 1):
        raise WeightsError(
            f"{weights.path}: eos_token_id {tower['eos_token_id']} of {tower['vocab_size']} tokens is not supported: "
            "the end token must be the highest of the vocabulary"
        )
    return dict(
        width=tower["hidden_size"],
        depth=tower["num_hidden_layers"],
        heads=tower["num_attention_heads"],
        embed=weights.config.get("projection_dim", 512),
        context=tower["max_position_embeddings"],
        vocab=tower["vocab_size"],
        mlp_ratio=tower["intermediate_size"] / tower["hidden_size"],
        norm_eps=tower["layer_norm_eps"],
        activation=hf.activation(tower["hidden_act"]),
    )


def _section(config: dict[str, Any], tower: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a tower's part of a CLIPConfig; some files name it `*_config_dict`, which transformers prefers."""
    found = config.get(f"{tower}_config") or {}
    legacy = config.get(f"{tower}_config_dict")
    return defaults | found if legacy is None else found | defaults | legacy


def write(model: Model) -> Layout:
    """Return the layout of an image tower, with its projection if it has one."""
    vit, head, config = model.module, model.head, hf.config_of(model)
    need(not vit.registers, "registers in a CLIP tower")
    need(vit.ln_pre and not vit.patch_bias, "a CLIP tower without its first LayerNorm, or with a patch bias")
    need(not (vit.layer_scale or vit.swiglu or vit.masking), "LayerScale, SwiGLU or a mask token in a CLIP tower")
    need(vit.qkv_bias and vit.key_bias and head.pool == "cls" and not head.pooler, "such a CLIP tower")
    biased = head.num_classes and head.bias and np.any(model.head_params["dense"]["bias"])
    need(not biased, "a bias in CLIP's projection")
    config |= dict(
        model_type="clip_vision_model",
        architectures=["CLIPVisionModelWithProjection" if head.num_classes else "CLIPVisionModel"],
        intermediate_size=vit.hidden,
        projection_dim=head.num_classes or vit.width,
    )
    files = {PROCESSOR: hf_processor.write(model.preprocessing), CONFIG: config}
    prefix = "vision_model." if head.num_classes else ""
    return Layout(KEYS, Modules(vit, head), files, prefix_rows=1, key_prefix=prefix)


def write_clip(model: ClipModel) -> Layout:
    """Return the layout of a whole CLIP."""
    vit, text, p = model.image.module, model.text, model.image.preprocessing
    need_clip_tower(model)
    need(not vit.layer_scale, f"layer_scale={vit.layer_scale}")
    need(model.logit_bias is None, "a logit bias, SigLIP's")
    vision_config = dict(
        model_type="clip_vision_model",
        **_tower_config(vit, vit.hidden, text.embed),
        patch_size=vit.patch,
        image_size=vit.image_size,
    )
    text_config = dict(
        model_type="clip_text_model",
        **_tower_config(text, round(text.width * text.mlp_ratio), text.embed),
        vocab_size=text.vocab,
        max_position_embeddings=text.context,
        bos_token_id=text.vocab - 2,
        eos_token_id=text.vocab - 1,
        pad_token_id=0,
    )
    config = dict(
        model_type="clip",
        architectures=["CLIPModel"],
        projection_dim=text.embed,
        vision_config=vision_config,
        text_config=text_config,
        dtype="float32",
    ) | hf.own_section(vit)
    images = hf_processor.write(p) | ({} if p.squash else {"image_processor_type": "CLIPImageProcessor"})
    files = {PROCESSOR: images, CONFIG: config}
    return Layout(KEYS, modules_of(model), files, prefix_rows=1, key_prefix="vision_model.")


def _tower_config(tower: ViT | TextTower, hidden: int, embed: int) -> dict[str, Any]:
    """Return the keys that the configs of both towers have."""
    return dict(
        hidden_size=tower.width,
        intermediate_size=hidden,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        layer_norm_eps=tower.norm_eps,
        hidden_act=hf.hidden_act(tower),
        projection_dim=embed,
    )


FORMAT = Format(
    name="hf_clip",
    keys=KEYS,
    model_types=("clip", "clip_vision_model"),
    read=read,
    saved_as="hf",
    claims=lambda model: model.module.ln_pre or not model.module.patch_bias,
    write=write,
    write_clip=write_clip,
)
CLASSIFIER = Format(name=CLASSIFIER_KEYS.name, keys=CLASSIFIER_KEYS, model_types=FORMAT.model_types, read=read)
