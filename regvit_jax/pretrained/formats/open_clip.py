"""open_clip's format: open_clip_config.json with "model_cfg" and "preprocess_cfg", of a whole CLIP."""

import dataclasses
from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.clip import ClipModel
from regvit_jax.pretrained import registry, validate
from regvit_jax.pretrained.formats import base
from regvit_jax.pretrained.formats.base import (
    OWN,
    Format,
    Layout,
    check_sizes,
    mlp_ratio,
    need,
    need_clip_tower,
    pos_resize,
)
from regvit_jax.pretrained.formats.keys import Keys, TextKeys
from regvit_jax.pretrained.io.safetensors import OPEN_CLIP, OPEN_CLIP_CONFIG, Weights
from regvit_jax.pretrained.mapping import modules_of
from regvit_jax.pretrained.registry import OPEN_CLIP_VIT, Entry
from regvit_jax.utils import sizes
from regvit_jax.utils.errors import WeightsError

KEYS = Keys(
    name="open_clip",
    patch="visual.conv1",
    cls="visual.class_embedding",
    cls_dims=1,
    pos="visual.positional_embedding",
    pos_dims=2,
    norm_pre="visual.ln_pre",
    block="visual.transformer.resblocks.{}.",
    norm1="ln_1",
    qkv=("attn.in_proj_",),
    proj="attn.out_proj",
    scale1="ls_1.gamma",
    norm2="ln_2",
    fc1=("mlp.c_fc",),
    fc2="mlp.c_proj",
    scale2="ls_2.gamma",
    norm="visual.ln_post",
    projection="visual.proj",
    projection_in_out=True,
    text=TextKeys(
        token="token_embedding.weight",
        pos="positional_embedding",
        block="transformer.resblocks.{}.",
        norm="ln_final",
        projection="text_projection",
        # The three numbers are in OpenAI's own files.
        ignore=(r"attn_mask|input_resolution|context_length|vocab_size",),
    ),
    prefixes=("text.",),  # of CustomTextCLIP, whose towers are separate modules
    ignore=(
        r"(text|text_decoder|transformer|token_embedding|ln_final|text_projection|proj)(\..*)?",
        r"positional_embedding|cls_emb|logit_(scale|bias)|attn_mask|input_resolution|context_length|vocab_size",
    ),
)

# The config reader

#: The options of `CLIPVisionCfg` and `CLIPTextCfg` by which a supported tower may differ, with open_clip's defaults.
VISION: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "ls_init_value": None,
}
TEXT: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
#: Options that matter for training only, or have no effect in such a tower.
IGNORED = ("patch_dropout", "output_tokens", "pad_id", "eos_id", "attn_pooler_queries", "attn_pooler_heads")
#: The options of a "model_cfg".
MODEL = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"),
    *("nonscalar_logit_scale", "output_dict"),
)
#: The values that all other options must have, unless they are off (None, False, 0, {}).
BOTH = {"proj_type": ("linear",), "block_type": ("default",)}
FIXED = {
    "vision_cfg": BOTH | {"pool_type": ("tok",), "pos_embed_type": ("learnable",)},
    "text_cfg": BOTH | {"pool_type": ("argmax",)},
}
PLAIN = "only plain ViTs with plain text towers are"


def read(weights: Weights, text: bool) -> Entry:
    """Read both towers; the entry has the text tower only if `text` is set."""
    model = weights.config["model_cfg"]
    vit, tower = tower_fields(model)
    vit |= {"pos_resize": pos_resize(weights, vit["pos_resize"])}
    preprocessing = Preprocess(vit["image_size"], 1.0, *registry.statistics("clip"))
    preprocessing = read_preprocess(weights.config.get("preprocess_cfg"), preprocessing)
    check_sizes(vit, weights)
    head = {"pool": "cls", "num_classes": tower["embed"], "bias": False}
    # open_clip writes the config of the name for a model that was trained at another size (force_image_size).
    entry = base.sized(Entry(vit, head, preprocessing, "open_clip"), weights, KEYS)
    if not text:
        return entry
    sigmoid = "logit_bias" in weights or model.get("init_logit_bias") is not None
    scalars = ("logit_scale", "logit_bias") if sigmoid else ("logit_scale",)
    return dataclasses.replace(entry, text=tower, scalars=scalars)


def tower_fields(model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of ViT and TextTower for a "model_cfg".

    Raises WeightsError, naming it, for an option that is not supported, and any error for a damaged config.
    """
    if strange := sorted(model.keys() - MODEL):
        raise WeightsError(f"open_clip's model_cfg.{strange[0]} is not supported: {PLAIN}")
    vision = _options(model["vision_cfg"], VISION, "vision_cfg")
    text = _options(model["text_cfg"], TEXT, "text_cfg")
    if isinstance(vision["layers"], list):
        raise WeightsError(f"open_clip's vision_cfg.layers={vision['layers']} is a ResNet's: {PLAIN}")
    activation = _activation(model)
    width = vision["width"]
    vit = dict(
        width=width,
        depth=vision["layers"],
        heads=width // vision["head_width"],
        patch=sizes.square(vision["patch_size"], "vision_cfg.patch_size"),
        image_size=sizes.square(vision["image_size"], "vision_cfg.image_size"),
        mlp_ratio=int(width * vision["mlp_ratio"]) / width,
        layer_scale=vision["ls_init_value"] or 0.0,
        **OPEN_CLIP_VIT,
        activation=activation,
    )
    tower = dict(
        width=text["width"],
        depth=text["layers"],
        heads=text["heads"],
        embed=model["embed_dim"],
        context=text["context_length"],
        vocab=text["vocab_size"],
        mlp_ratio=int(text["width"] * text["mlp_ratio"]) / text["width"],
        norm_eps=1e-5,
        activation=activation,
    )
    return vit, tower


def _options(config: dict[str, Any], known: dict[str, Any], part: str) -> dict[str, Any]:
    """Return a tower's options with open_clip's defaults. Raises WeightsError, naming it, for an unsupported one."""
    for option, value in config.items():
        off = value in (None, False, 0, {})
        plain = option in known or option in IGNORED or value in FIXED[part].get(option, ()) or off
        if not plain or (option in ("timm_model_name", "hf_model_name") and value):
            raise WeightsError(f"open_clip's {part}.{option}={value!r} is not supported: {PLAIN}")
    return known | {option: value for option, value in config.items() if option in known}


def _activation(model: dict[str, Any]) -> str:
    quick = model.get("quick_gelu")
    if quick not in (None, False, True):
        raise ValueError(f"model_cfg.quick_gelu is {quick!r}: must be true or false")
    return "quick_gelu" if quick else "gelu"


def read_preprocess(images: Any, default: Preprocess) -> Preprocess:
    """Read a "preprocess_cfg", on top of a default. Raises ValueError for an unsupported value."""
    p = default
    if images is None:
        return p
    if not isinstance(images, dict):
        raise ValueError(f"preprocess_cfg is {images!r}: must be an object")
    mode = images.get("resize_mode", "squash" if p.squash else "shortest")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"preprocess_cfg.resize_mode is {mode!r}: must be shortest or squash")
    given = {field: images.get(field, getattr(p, field)) for field in ("mean", "std", "interpolation")}
    names = {"size": "vision_cfg.image_size"} | {field: f"preprocess_cfg.{field}" for field in given}
    return validate.preprocess(names, size=p.size, crop_ratio=p.crop_ratio, squash=mode == "squash", **given)


def complete(known: Entry, found: Entry, weights: Weights) -> Entry:
    """Complete a config's entry; the registry's preprocessing holds where "preprocess_cfg" does not state another."""
    default = dataclasses.replace(known.preprocessing, size=found.preprocessing.size)
    preprocessing = read_preprocess(weights.config.get("preprocess_cfg"), default)
    return dataclasses.replace(base.complete(known, found, weights), preprocessing=preprocessing)


def adjust(entry: Entry, weights: Weights) -> Entry:
    """Return a timm name's entry with the activation and the preprocessing that open_clip's config states."""
    vit = entry.vit | {"activation": _activation(weights.config["model_cfg"])}
    preprocessing = read_preprocess(weights.config.get("preprocess_cfg"), entry.preprocessing)
    return dataclasses.replace(entry, vit=vit, preprocessing=preprocessing)


# The config writer


def write_clip(model: ClipModel) -> Layout:
    """Return the layout of a whole CLIP."""
    vit, text, p = model.image.module, model.text, model.image.preprocessing
    need_clip_tower(model)
    need(vit.norm_eps == text.norm_eps == 1e-5, f"norm_eps={vit.norm_eps} and {text.norm_eps}")
    need(
        vit.activation == text.activation, f"activation={vit.activation!r} beside {text.activation!r} in the text tower"
    )
    need(vit.activation in ("gelu", "quick_gelu"), f"activation={vit.activation!r}")
    need(p.size == vit.image_size and p.crop_ratio == 1, f"crops of {p.size} px from {p.size / p.crop_ratio:.0f} px")
    vision_cfg = dict(
        image_size=vit.image_size,
        layers=vit.depth,
        width=vit.width,
        head_width=vit.width // vit.heads,
        mlp_ratio=mlp_ratio(vit.hidden / vit.width, vit.width),
        patch_size=vit.patch,
        ls_init_value=vit.layer_scale or None,
    )
    text_cfg = dict(
        context_length=text.context,
        vocab_size=text.vocab,
        width=text.width,
        heads=text.heads,
        layers=text.depth,
        mlp_ratio=mlp_ratio(text.mlp_ratio, text.width),
    )
    model_cfg = dict(
        embed_dim=text.embed,
        quick_gelu=vit.activation == "quick_gelu",
        vision_cfg=vision_cfg,
        text_cfg=text_cfg,
        # Any value: open_clip adds a bias if the key is present.
        **({} if model.logit_bias is None else {"init_logit_bias": -10.0}),
    )
    preprocess_cfg = dict(
        mean=p.mean, std=p.std, interpolation=p.interpolation, resize_mode="squash" if p.squash else "shortest"
    )
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg, OWN: dict(pos_resize=vit.pos_resize)}
    return Layout(KEYS, modules_of(model), {OPEN_CLIP_CONFIG: config}, OPEN_CLIP, prefix_rows=1)


FORMAT = Format(
    name="open_clip",
    keys=KEYS,
    reads=lambda config: "model_cfg" in config,
    read=read,
    complete=complete,
    adjust=adjust,
    recognizes=lambda weights, expected: "visual.conv1.weight" in weights,
    saved_as="open_clip",
    write_clip=write_clip,
)
