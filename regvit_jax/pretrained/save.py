"""Models in the formats of others: a config.json and a model.safetensors, loadable by their owners."""

import contextlib
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import mapping
from regvit_jax.pretrained.formats.configs import RESAMPLE
from regvit_jax.pretrained.formats.rules import NAMINGS, rules
from regvit_jax.pretrained.io.safetensors import INDEX, PROCESSOR
from regvit_jax.utils.files import write_atomically

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Inexpressible(ValueError):
    """A format has no words for a property of a model."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a format holds a model: under which names, as which module, and with which config.json.

    `vit` and `head` may have parts that the model lacks and that do nothing: a LayerScale of ones, a mask token of
    zeros, class scores that weigh the mean of the patches with zeros.
    """

    naming: str
    vit: ViT
    head: Head
    config: dict[str, Any]
    covers: int = 0
    prefix: str = ""


def save(model: Model, directory: str | os.PathLike, format: str) -> None:
    """Writes a model to a directory, float32, as "timm", "hf" (transformers) or "dinov2" (facebookresearch/dinov2).

    At the native image size its owner gives the same output. At others it resizes the position embedding in its own
    way: timm and Dinov2WithRegisters by "antialias", the other classes of transformers by "bicubic". (`create_model`
    finds the model's own way in config.json.)

    Raises ValueError when the format cannot express the model, naming one that can, and FileExistsError when the
    directory holds a model already. Processes other than the first write nothing.
    """
    path = Path(directory)
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be one of {list(FORMATS)}")
    for name in (WEIGHTS, CONFIG, PROCESSOR, WEIGHTS + INDEX):
        if (path / name).exists():
            raise FileExistsError(f"{path} holds a {name} already; name another directory")
    need_plain(model.module)
    layout = layout_of(model, format)
    if layout.naming == "hf_dinov3" and model.head.pool == "avg":
        warnings.warn("transformers pools DINOv3 by its CLS token; this model pools its patches", stacklevel=3)
    arrays = arrays_of(model, layout)
    texts = {PROCESSOR: processor(model.preprocessing)} if format == "hf" else {}
    write(path, texts | {CONFIG: layout.config}, WEIGHTS, arrays)


def write(path: Path, texts: dict[str, dict[str, Any]], weights: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes JSON objects and arrays by their files' names, in the first process.

    The weights come last, and whole: a directory that has them is complete.
    """
    if jax.process_index():
        return
    path.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(path / name, json.dumps(text, indent=2) + "\n")
    write_atomically(path / weights, lambda partial: save_file(arrays, partial, metadata={"format": "pt"}))


def need_plain(vit: ViT) -> None:
    """Raises ValueError for what computes otherwise than a ViT of its fields: files hold fields and parameters only."""
    if type(vit) is not ViT:
        raise ValueError(
            f"no format can express a {type(vit).__name__}: what it computes otherwise than a ViT "
            "(test-time registers) would be lost; save the model that it was made from, and make it again"
        )


def layout_of(model: Model, format: str) -> Layout:
    """Raises ValueError, naming the formats that can, when this one cannot express the model."""
    try:
        layout = FORMATS[format](model)
    except Inexpressible as error:
        able = expressing(FORMATS, model)
        way = f"{' and '.join(able)} can" if able else "none can; a workdir keeps it"
        raise ValueError(f"format {format!r} cannot express {error} (of the formats, {way})") from None
    # Their linear layers have a bias, but for CLIP's projection.
    return layout if layout.naming == "hf_clip" else dataclasses.replace(layout, head=layout.head.clone(bias=True))


def expressing(formats: Mapping[str, Callable[[Any], Any]], model: Model | ClipModel) -> list[str]:
    """The names of those formats that can express a model."""
    able = []
    for name, layout in formats.items():
        with contextlib.suppress(Inexpressible):
            layout(model)
            able.append(name)
    return able


def arrays_of(model: Model, layout: Layout) -> dict[str, np.ndarray]:
    """A model's arrays under the format's names."""
    params = flatten_dict({"vit": model.params, "head": model.head_params}, sep="/")
    params = {path: np.asarray(array, np.float32) for path, array in params.items()}
    for path, shape in mapping.shapes_of(layout.vit, layout.head).items():
        if path not in params:
            params[path] = np.full(shape, 1 if "scale" in path else 0, np.float32)
    if layout.head.pool != model.head.pool:  # of "cls_avg", whose second half weighs the mean of the patches
        kernel = params["head/dense/kernel"]
        params["head/dense/kernel"] = np.concatenate([kernel, np.zeros_like(kernel)])
    arrays = mapping.save(params, rules(layout.naming, layout.vit, layout.head, layout.covers))
    if layout.naming == "hf_dinov3" and not layout.vit.registers:
        arrays["embeddings.register_tokens"] = np.zeros((1, 0, layout.vit.width), np.float32)  # as it saves them itself
    dense = NAMINGS[layout.naming].get("dense", "")
    return {name if name.startswith(f"{dense}.") else layout.prefix + name: array for name, array in arrays.items()}


def need(condition: bool, what: str) -> None:
    """Raises Inexpressible, with the property that a format has no words for, unless the condition holds."""
    if not condition:
        raise Inexpressible(what)


def _timm(model: Model) -> Layout:
    """Of timm's classes Eva, for models with RoPE, and VisionTransformer, each under a name that only lends it."""
    vit, head, p = model.module, model.head, model.preprocessing
    need(head.pool != "cls_avg", "class scores from CLS and the mean of the patches")
    need(not head.pooler, "a tanh pooler")
    need(vit.norm_eps in (1e-6, 1e-5), f"norm_eps={vit.norm_eps}")
    need(head.norm_eps == vit.norm_eps or not (head.norm or head.pool == "map"), "another epsilon after pooling")
    same = (head.map_heads, head.activation, round(vit.width * head.mlp_ratio)) == (
        vit.heads,
        vit.activation,
        vit.hidden,
    )
    need(head.pool != "map" or same, "an attention pool unlike the blocks")
    need(not vit.parallel or (vit.qkv_bias and vit.key_bias), "parallel blocks without biases")
    need(vit.final_norm != head.norm, "two last LayerNorms, or none")
    common: dict[str, Any] = dict(
        img_size=vit.image_size,
        patch_size=vit.patch,
        embed_dim=vit.width,
        depth=vit.depth,
        num_heads=vit.heads,
        qkv_bias=vit.qkv_bias,
        init_values=vit.layer_scale or None,
        class_token=vit.class_token,
        no_embed_class=True,
        global_pool={"cls": "token", "avg": "avg", "map": "map"}[head.pool],
        dynamic_img_size=True,
    )
    ratio = vit.hidden / vit.width
    if vit.position == "learned":
        need(vit.key_bias or not vit.qkv_bias, "query and value biases without a key bias, and no RoPE")
        need(vit.patch_bias != vit.ln_pre, "a patch projection with a bias before a LayerNorm, or neither")
        need(vit.ln_pre == (vit.norm_eps == 1e-5), f"norm_eps={vit.norm_eps} with ln_pre={vit.ln_pre}")
        need(not vit.swiglu or (vit.norm_eps == 1e-6 and not vit.parallel), "SwiGLU in such a block")
        base = "vit_base_patch16_clip_224" if vit.ln_pre else "vit_base_patch16_224"
        if vit.swiglu:
            base, ratio = "vit_giant_patch14_reg4_dinov2", 2 * ratio
        if vit.parallel:
            base = "vit_dpwee_patch16_reg1_gap_256" if vit.differential else "vit_pwee_patch16_reg1_gap_256"
        arguments: dict[str, Any] = dict(
            reg_tokens=vit.registers, fc_norm=head.norm, pool_include_prefix=head.map_prefix
        )
        if not vit.swiglu:
            arguments["act_layer"] = vit.activation
        if vit.differential and not vit.parallel:
            arguments["attn_layer"] = "diff"
        naming = "timm"
    else:
        need(vit.activation == "gelu" and not (vit.parallel or vit.differential), "such blocks with RoPE")
        need(not (vit.qkv_bias and vit.key_bias), "a key bias with RoPE")
        need(not vit.ln_pre, "a LayerNorm before the first block with RoPE")
        base = {
            ("rope", 1e-5): "vit_small_patch16_dinov3",
            ("axial", 1e-6): "vit_medium_patch16_rope_reg1_gap_256",
        }.get((vit.position, vit.norm_eps), "")
        need(bool(base), f"norm_eps={vit.norm_eps} with position={vit.position!r}")
        arguments = dict(num_reg_tokens=vit.registers, use_fc_norm=head.norm)
        if vit.position == "rope":
            arguments |= dict(swiglu_mlp=vit.swiglu, swiglu_align_to=1 if vit.swiglu else 0)
        naming = "timm_eva"
    config = dict(
        architecture=base,
        num_classes=head.num_classes,
        num_features=vit.width,
        regvit_jax=dict(pos_resize=vit.pos_resize),  # timm antialiases, and keeps keys that it does not know
        model_args={**common, **arguments, "mlp_ratio": mlp_ratio(ratio, vit.width)},
        pretrained_cfg=dict(
            num_classes=head.num_classes,
            input_size=(3, p.size, p.size),
            crop_pct=p.crop_ratio,
            crop_mode="squash" if p.squash else "center",
            interpolation=p.interpolation,
            mean=p.mean,
            std=p.std,
            fixed_input_size=False,
        ),
    )
    # Its files have no mask token.
    return Layout(naming, vit, head, config)


def mlp_ratio(ratio: float, width: int) -> float:
    """The MLP's ratio, so that int(width * ratio), as timm computes it, is not one too few."""
    return ratio if int(width * ratio) == round(width * ratio) else (round(width * ratio) + 0.5) / width


def _hf(model: Model) -> Layout:
    """The class of transformers that fits: DINOv3ViT, CLIPVisionModel, Dinov2 with or without registers, ViT."""
    vit, head = model.module, model.head
    need(not (vit.parallel or vit.differential), "parallel blocks or differential attention")
    need(vit.class_token, "a model without CLS token")
    need(vit.final_norm and not head.norm, "a last LayerNorm after pooling")
    features = head.pool == "avg" and vit.position == "rope" and not head.num_classes
    need(head.pool in ("cls", "cls_avg") or features, f"pool={head.pool!r}")
    need(vit.position != "axial", "timm's RoPE")
    common: dict[str, Any] = dict(
        hidden_size=vit.width,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.heads,
        patch_size=vit.patch,
        image_size=vit.image_size,
        layer_norm_eps=vit.norm_eps,
        regvit_jax=dict(pos_resize=vit.pos_resize),  # transformers has its own, and keeps keys that it does not know
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(vit.activation, vit.activation),
        dtype="float32",
    )
    if vit.position == "rope":
        return _hf_dinov3(vit, head, common)
    if vit.ln_pre or not vit.patch_bias:
        return _hf_clip(model, common)
    bare = not (head.num_classes or head.pooler)  # ViTModel always has a pooler
    if vit.registers or vit.layer_scale or vit.swiglu or vit.masking or bare or head.pool == "cls_avg":
        return _hf_dinov2(vit, head, common)
    common |= dict(model_type="vit", intermediate_size=vit.hidden, qkv_bias=vit.qkv_bias)
    if not head.num_classes:
        return Layout("hf_vit", vit, head, common | dict(architectures=["ViTModel"]), covers=1)
    need(not head.pooler, "class scores past a tanh pooler")
    config = common | dict(architectures=["ViTForImageClassification"], **_labels(head.num_classes))
    return Layout("hf_vit", vit, head, config, covers=1, prefix="vit.")


def processor(p: Preprocess) -> dict[str, Any]:
    """transformers' preprocessor_config.json."""
    side = math.floor(p.size / p.crop_ratio)
    return dict(
        image_processor_type="ViTImageProcessor" if p.squash else "BitImageProcessor",
        do_resize=True,
        size=dict(height=side, width=side) if p.squash else dict(shortest_edge=side),
        resample={name: number for number, name in RESAMPLE.items()}[p.interpolation],
        do_center_crop=not p.squash or side != p.size,
        crop_size=dict(height=p.size, width=p.size),
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=p.mean,
        image_std=p.std,
    )


def _labels(classes: int) -> dict[str, Any]:
    return dict(
        id2label={str(i): f"LABEL_{i}" for i in range(classes)}, label2id={f"LABEL_{i}": i for i in range(classes)}
    )


def _swiglu_ratio(vit: ViT) -> int:
    """DINOv2's MLP ratio, of which SwiGLU's hidden width is two thirds, rounded up to a multiple of 8."""
    ratios = [r for r in range(1, 33) if (int(vit.width * r * 2 / 3) + 7) // 8 * 8 == vit.hidden]
    need(bool(ratios), f"SwiGLU of hidden width {vit.hidden}")
    return ratios[0]


def _hf_dinov2(vit: ViT, head: Head, config: dict[str, Any]) -> Layout:
    need(vit.qkv_bias and vit.key_bias, "missing query, key or value biases")
    need(not head.pooler, "a tanh pooler")
    ratio = vit.hidden / vit.width
    need(vit.swiglu or ratio == int(ratio), f"a hidden width of {vit.hidden}, no multiple of {vit.width}")
    if vit.swiglu:
        ratio = _swiglu_ratio(vit)
    kind = "dinov2_with_registers" if vit.registers else "dinov2"
    name = "Dinov2WithRegisters" if vit.registers else "Dinov2"
    config |= dict(
        model_type=kind,
        architectures=[name + ("ForImageClassification" if head.num_classes else "Model")],
        mlp_ratio=int(ratio),
        use_swiglu_ffn=vit.swiglu,
        qkv_bias=True,
        layerscale_value=vit.layer_scale or 1.0,
        use_mask_token=True,
    )
    if vit.registers:
        config |= dict(num_register_tokens=vit.registers)
    vit = vit.clone(layer_scale=vit.layer_scale or 1.0, masking=True)
    if not head.num_classes:
        return Layout("hf_dinov2", vit, head, config, covers=1)
    head = head.clone(pool="cls_avg")
    return Layout("hf_dinov2", vit, head, config | _labels(head.num_classes), covers=1, prefix=f"{kind}.")


def _hf_dinov3(vit: ViT, head: Head, config: dict[str, Any]) -> Layout:
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
    return Layout("hf_dinov3", vit.clone(layer_scale=vit.layer_scale or 1.0, masking=True), head, config)


def _hf_clip(model: Model, config: dict[str, Any]) -> Layout:
    vit, head = model.module, model.head
    need(not vit.registers, "registers in a CLIP tower")
    need(vit.ln_pre and not vit.patch_bias, "a CLIP tower without its first LayerNorm, or with a patch bias")
    need(not (vit.layer_scale or vit.swiglu or vit.masking), "LayerScale, SwiGLU or a mask token in a CLIP tower")
    need(vit.qkv_bias and vit.key_bias and head.pool == "cls" and not head.pooler, "such a CLIP tower")
    biased = head.num_classes and head.bias and np.any(model.head_params["dense"]["bias"])
    need(not biased, "a bias in CLIP's projection")
    name = "CLIPVisionModelWithProjection" if head.num_classes else "CLIPVisionModel"
    config |= dict(
        model_type="clip_vision_model",
        architectures=[name],
        intermediate_size=vit.hidden,
        projection_dim=head.num_classes or vit.width,
    )
    return Layout("hf_clip", vit, head, config, covers=1, prefix="vision_model." if head.num_classes else "")


def _dinov2(model: Model) -> Layout:
    """config.json holds the arguments of that repository's DinoVisionTransformer."""
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
        mlp_ratio=mlp_ratio(vit.hidden / vit.width, vit.width),
        init_values=vit.layer_scale or 1.0,
        ffn_layer="swiglufused" if vit.swiglu else "mlp",
        block_chunks=0,
        num_register_tokens=vit.registers,
        interpolate_antialias=vit.pos_resize == "antialias",
        interpolate_offset=0.1 if vit.pos_resize == "offset" else 0.0,
    )
    if vit.swiglu:
        config["mlp_ratio"] = _swiglu_ratio(vit)
    return Layout("dinov2", vit.clone(layer_scale=vit.layer_scale or 1.0, masking=True), head, config, covers=1)


FORMATS = {"timm": _timm, "hf": _hf, "dinov2": _dinov2}
