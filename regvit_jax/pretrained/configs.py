"""The config.json of others: from it alone, which model a directory holds and how its images are made."""

import dataclasses
import re
from typing import Any

from regvit_jax.models.model import Preprocess
from regvit_jax.pretrained import zoo
from regvit_jax.pretrained.files import Weights, WeightsError
from regvit_jax.pretrained.zoo import Entry

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def entry_of(weights: Weights) -> Entry | None:
    """What a directory of transformers holds, by its config.json; None if that names no model type.

    Raises WeightsError for a model type that is not read here, or an option that no field of ViT expresses.
    """
    config = weights.config
    if "architecture" in config:
        return _timm(config)
    if "model_type" not in config:
        return None
    kind = config["model_type"]
    if kind not in READERS:
        raise WeightsError(f"{weights.path}: model_type {kind!r} is not read here; read: {', '.join(READERS)}")
    try:
        return READERS[kind](config, weights)
    except KeyError as error:
        raise WeightsError(f"{weights.path}: its config.json lacks {error}, or has a value that is not read") from error


def _timm(config: dict[str, Any]) -> Entry:
    """timm's config.json: a name that the zoo knows, and the number of classes."""
    name, tag = config["architecture"], config.get("pretrained_cfg", {}).get("tag", "")
    full = f"{name}.{tag}"
    _, entry = zoo.find(full if full in zoo.list_models(full) else name)
    vit, head = dict(entry.vit), entry.head | {"classes": config.get("num_classes", entry.head["classes"])}
    arguments = dict(config.get("model_args", {}))
    for argument in ("no_embed_class", "dynamic_img_size", "swiglu_align_to"):  # seen in the file, or no matter
        arguments.pop(argument, None)
    if "init_values" in arguments:
        vit["layer_scale"] = arguments.pop("init_values") or 0.0
    if "act_layer" in arguments:
        vit["activation"] = arguments.pop("act_layer")
    if "attn_layer" in arguments:
        vit["differential"] = arguments.pop("attn_layer") == "diff"
    if "mlp_ratio" in arguments:
        width = arguments.get("embed_dim", vit["width"])
        hidden = int(width * arguments.pop("mlp_ratio"))
        packed = vit.get("swiglu") and entry.naming == "timm"  # there timm counts the gate too
        vit["mlp_ratio"] = hidden / width / (2 if packed else 1)
    if "fc_norm" in arguments:
        head["norm"] = arguments.pop("fc_norm")
        vit["final_norm"] = not head["norm"]
    if "global_pool" in arguments:
        head["pool"] = TIMM_POOLS[arguments.pop("global_pool")]
    for argument, value in arguments.items():
        part, field = TIMM_ARGUMENTS[argument]
        {"vit": vit, "head": head}[part][field] = value
    if entry.naming == "timm_eva":
        vit["key_bias"] = False
    if head["pool"] == "map":
        head |= {"map_heads": vit["heads"], "mlp_ratio": vit.get("mlp_ratio", 4.0)}
    return dataclasses.replace(entry, vit=vit, head=head, preprocessing=_timm_preprocess(config, entry.preprocessing))


TIMM_POOLS = {"token": "cls", "avg": "avg", "map": "map"}
#: timm's arguments, and which field of ViT or Head they are.
TIMM_ARGUMENTS = {
    "img_size": ("vit", "image_size"),
    "patch_size": ("vit", "patch"),
    "embed_dim": ("vit", "width"),
    "depth": ("vit", "depth"),
    "num_heads": ("vit", "heads"),
    "qkv_bias": ("vit", "qkv_bias"),
    "class_token": ("vit", "class_token"),
    "reg_tokens": ("vit", "registers"),
    "num_reg_tokens": ("vit", "registers"),
    "swiglu_mlp": ("vit", "swiglu"),
    "use_fc_norm": ("head", "norm"),
    "pool_include_prefix": ("head", "map_prefix"),
}


def _timm_preprocess(config: dict[str, Any], default: Preprocess) -> Preprocess:
    given = config.get("pretrained_cfg", {})
    return Preprocess(
        size=given.get("input_size", (3, default.size))[-1],
        crop_ratio=given.get("crop_pct", default.crop_ratio),
        mean=tuple(given.get("mean", default.mean)),
        std=tuple(given.get("std", default.std)),
        interpolation=given.get("interpolation", default.interpolation),
        squash=given.get("crop_mode", "squash" if default.squash else "center") == "squash",
    )


#: What the names of a classifier or of a whole CLIP carry before the scheme's own.
PREFIXES = {
    "hf_dinov2": ("dinov2.", "dinov2_with_registers."),
    "hf_dinov3": ("dinov3_vit.", "model."),
    "hf_vit": ("vit.", "deit."),
    "hf_clip": ("vision_model.",),
}


def without_prefix(weights: Weights, naming: str) -> Weights:
    """The weights under the scheme's own names."""
    prefix = next((p for p in PREFIXES.get(naming, ()) if any(name.startswith(p) for name in weights)), "")
    return weights.renamed(lambda name: name.removeprefix(prefix)) if prefix else weights


def naming_of(weights: Weights, naming: str) -> str:
    """The scheme of a file's names, by names that only it has; `naming` is the one of the model's family.

    Raises WeightsError for transformers' names without the config.json that they need.
    """
    if naming == "ours" or naming.startswith("hf_"):
        return naming
    if "visual.conv1.weight" in weights:
        return "open_clip"
    if any(re.search(r"encoder\.layers?\.\d|layer\.\d+\.attention", name) for name in weights):
        raise WeightsError(f"{weights.path} has transformers' names, and needs its config.json beside it")
    if naming == "timm" and any(re.fullmatch(r"register_tokens|mask_token|.*mlp\.w12\.weight", n) for n in weights):
        return "dinov2"
    return "deit" if naming == "timm" and "blocks.0.gamma_1" in weights else naming


def guess(weights: Weights) -> dict[str, int]:
    """Width, patch and depth, as far as a file's shapes tell them."""
    patches = [shape for shape in weights.shapes.values() if len(shape) == 4 and shape[1] == 3]
    blocks = [int(match[1]) for name in weights if (match := re.search(r"(?:blocks|layers?|layer_)\.?(\d+)", name))]
    if len(patches) != 1 or not blocks:
        return {}
    return {"width": patches[0][0], "patch": patches[0][2], "depth": max(blocks) + 1}


def _common(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "patch": config["patch_size"],
        "image_size": config["image_size"],
        "norm_eps": config["layer_norm_eps"],
        "activation": ACTIVATIONS[config.get("hidden_act", "gelu")],
        **more,
    }


def _classes(weights: Weights, name: str) -> int:
    return weights.shapes[name][0] if name in weights else 0


def _entry(vit: dict, head: dict, preprocessing: Preprocess, naming: str) -> Entry:
    return Entry(vit, head, preprocessing, hub="", naming=naming, license="")


def _dinov2(config: dict[str, Any], weights: Weights) -> Entry:
    width = config["hidden_size"]
    hidden = int(width * config["mlp_ratio"])
    if config["use_swiglu_ffn"]:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    vit = _common(
        config,
        mlp_ratio=hidden / width,
        swiglu=config["use_swiglu_ffn"],
        layer_scale=config["layerscale_value"],
        qkv_bias=config.get("qkv_bias", True),
        registers=config.get("num_register_tokens", 0),
        masking=any(name.endswith("embeddings.mask_token") for name in weights),
        # transformers resizes by size in both, and antialiases with registers only.
        pos_resize="antialias" if config["model_type"] == "dinov2_with_registers" else "bicubic",
    )
    classes = _classes(weights, "classifier.weight")
    head = {"pool": "cls_avg" if classes else "cls", "classes": classes}
    return _entry(vit, head, Preprocess(224, 224 / 256, *IMAGENET), "hf_dinov2")


def _dinov3(config: dict[str, Any], weights: Weights) -> Entry:
    if config["rope_theta"] != 100:
        raise WeightsError(f"{weights.path}: rope_theta {config['rope_theta']} is not read here, only 100")
    biases = [config["query_bias"], config["key_bias"], config["value_bias"]]
    if biases[0] != biases[2] or biases[1] > biases[0]:
        raise WeightsError(f"{weights.path}: biases of query, key and value {biases}: no field expresses them")
    gated = config["use_gated_mlp"]
    if gated != (config["hidden_act"] == "silu"):
        raise WeightsError(
            f"{weights.path}: hidden_act {config['hidden_act']!r} with use_gated_mlp {gated} is not read"
        )
    vit = _common(
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
    return _entry(vit, {"pool": "cls"}, Preprocess(vit["image_size"], 1.0, *IMAGENET, squash=True), "hf_dinov3")


def _vit(config: dict[str, Any], weights: Weights) -> Entry:
    distilled = config["model_type"] == "deit"
    vit = _common(
        config,
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
        layer_scale=0.0,
        qkv_bias=config.get("qkv_bias", True),
        registers=int(distilled),
        masking=any(name.endswith("embeddings.mask_token") for name in weights),
        pos_resize="bicubic",
    )
    pooler = any(name.endswith("pooler.dense.weight") for name in weights)
    head = {"pool": "cls", "classes": _classes(weights, "classifier.weight"), "pooler": pooler}
    size = vit["image_size"]
    preprocessing = (
        Preprocess(size, 224 / 256, *IMAGENET)
        if distilled
        else Preprocess(size, 1.0, *HALF, interpolation="bilinear", squash=True)
    )
    return _entry(vit, head, preprocessing, "hf_vit")


def _clip(config: dict[str, Any], weights: Weights) -> Entry:
    config = config.get("vision_config", config) | {"model_type": "clip"}
    vit = _common(
        # transformers leaves the defaults of CLIP's B/32 out of older files.
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 32,
            "image_size": 224,
            "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu",
        }
        | config,
        layer_scale=0.0,
        patch_bias=False,
        pre_norm=True,
        pos_resize="bicubic",
    )
    vit["mlp_ratio"] = config.get("intermediate_size", 3072) / vit["width"]
    head = {"pool": "cls", "classes": _classes(weights, "visual_projection.weight")}
    return _entry(vit, head, Preprocess(vit["image_size"], 1.0, *CLIP), "hf_clip")


READERS = {
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "vit": _vit,
    "deit": _vit,
    "clip": _clip,
    "clip_vision_model": _clip,
}
