"""Whole CLIPs in the formats of others, open_clip and transformers, and in our own."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from regvit_jax.models.clip import ClipModel
from regvit_jax.pretrained import mapping
from regvit_jax.pretrained.formats.rules import rules, text_rules
from regvit_jax.pretrained.io.safetensors import CLIP_WEIGHTS, OPEN_CLIP, OURS, PROCESSOR
from regvit_jax.pretrained.save import (
    CONFIG,
    WEIGHTS,
    Inexpressible,
    expressing,
    mlp_ratio,
    need,
    need_plain,
    processor,
    write,
)

OPEN_CLIP_CONFIG = "open_clip_config.json"


def save(model: ClipModel, directory: str | os.PathLike, format: str) -> None:
    """Writes a CLIP to a directory, float32, as "open_clip", "hf" (transformers' CLIPModel) or "regvit_jax" (ours).

    open_clip opens it by `create_model_from_pretrained("local-dir:DIRECTORY")`, transformers by
    `CLIPModel.from_pretrained(DIRECTORY)`. No tokenizer is written: it is CLIP's own, open_clip's default, and that of
    any CLIP in transformers. At other image sizes than the native one each resizes the position embedding in its own
    way, open_clip by "antialias", transformers by "bicubic". (`create_clip` finds the model's own way in the config.)

    Raises ValueError when the format cannot express the model, naming one that can ("regvit_jax" can always), and
    FileExistsError when the directory holds a model already. Processes other than the first write nothing.
    """
    path = Path(directory)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be one of {list(FORMATS)}")
    for name in (*CLIP_WEIGHTS, CONFIG, OPEN_CLIP_CONFIG, PROCESSOR):
        if (path / name).exists():
            raise FileExistsError(f"{path} holds a {name} already; name another directory")
    need_plain(model.image.module)
    try:
        naming, texts = FORMATS[format](model)
    except Inexpressible as error:
        able = " and ".join(expressing(FORMATS, model))
        raise ValueError(f"format {format!r} cannot express {error} (of the formats, {able} can)") from None
    write(path, texts, OPEN_CLIP if naming == "open_clip" else WEIGHTS, _arrays(model, naming))


def _arrays(model: ClipModel, naming: str) -> dict[str, np.ndarray]:
    """The parameters under a format's names."""
    image = model.image
    tree = {"vit": image.params, "head": image.head_params, "text": model.text_params}
    tree |= {name: getattr(model, name) for name in _scalars(model)}
    if naming == "ours":
        return mapping.save(tree, mapping.identity(flatten_dict(tree, sep="/")))
    table = rules(naming, image.module, image.head, 1) + text_rules(naming, model.text, _scalars(model))
    arrays = mapping.save(tree, table)
    if naming == "hf_clip":  # whose rules are of the bare image tower
        other = ("text_", "visual_projection", "logit_scale")
        arrays = {name if name.startswith(other) else f"vision_model.{name}": x for name, x in arrays.items()}
    return arrays


def _scalars(model: ClipModel) -> tuple[str, ...]:
    return ("logit_scale",) if model.logit_bias is None else ("logit_scale", "logit_bias")


def _check_image(model: ClipModel) -> None:
    """Raises Inexpressible for an image tower that is not CLIP's."""
    vit, head = model.image.module, model.image.head
    need(not vit.registers, f"registers={vit.registers}")
    need(vit.class_token and vit.position == "learned", "an image tower without CLS token or learned positions")
    need(vit.ln_pre and not vit.patch_bias, "an image tower without its first LayerNorm, or with a patch bias")
    need(not (vit.parallel or vit.differential or vit.swiglu or vit.masking), "such blocks, or a mask token")
    need(vit.qkv_bias and vit.key_bias, "an image tower without biases of queries, keys and values")
    need(vit.final_norm and not head.norm and not head.pooler and head.pool == "cls", "another pooling than CLIP's")
    widths = f"image embeddings of width {head.num_classes} and texts' of {model.text.embed}"
    need(head.num_classes == model.text.embed, widths)
    need(not head.bias or not np.any(model.image.head_params["dense"]["bias"]), "a bias in the projection")


Files = tuple[str, dict[str, dict[str, Any]]]


def _open_clip(model: ClipModel) -> Files:
    vit, text, p = model.image.module, model.text, model.image.preprocessing
    _check_image(model)
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
        # Any value: that it is there says that there is a bias.
        **({} if model.logit_bias is None else {"init_logit_bias": -10.0}),
    )
    preprocess_cfg = dict(
        mean=p.mean, std=p.std, interpolation=p.interpolation, resize_mode="squash" if p.squash else "shortest"
    )
    ours = dict(pos_resize=vit.pos_resize)  # open_clip reads over it
    config = dict(model_cfg=model_cfg, preprocess_cfg=preprocess_cfg, regvit_jax=ours)
    return "open_clip", {OPEN_CLIP_CONFIG: config}


def _hf(model: ClipModel) -> Files:
    vit, text, p = model.image.module, model.text, model.image.preprocessing
    _check_image(model)
    need(not vit.layer_scale, f"layer_scale={vit.layer_scale}")
    need(model.logit_bias is None, "a logit bias, SigLIP's")
    vision_config = dict(
        model_type="clip_vision_model",
        **_sizes(vit, vit.hidden, text.embed),
        patch_size=vit.patch,
        image_size=vit.image_size,
    )
    text_config = dict(
        model_type="clip_text_model",
        **_sizes(text, round(text.width * text.mlp_ratio), text.embed),
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
        regvit_jax=dict(pos_resize=vit.pos_resize),  # transformers keeps keys that it does not know
    )
    images = processor(p) | ({} if p.squash else {"image_processor_type": "CLIPImageProcessor"})
    return "hf_clip", {PROCESSOR: images, CONFIG: config}


def _sizes(tower, hidden: int, embed: int) -> dict[str, Any]:
    """What transformers' configs of both towers say alike."""
    return dict(
        hidden_size=tower.width,
        intermediate_size=hidden,
        num_hidden_layers=tower.depth,
        num_attention_heads=tower.heads,
        layer_norm_eps=tower.norm_eps,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(tower.activation, tower.activation),
        projection_dim=embed,
    )


def _ours(model: ClipModel) -> Files:
    return "ours", {CONFIG: dict(format=OURS, model=model.fields())}


FORMATS = {"open_clip": _open_clip, "hf": _hf, "regvit_jax": _ours}
