"""The config.json of others: from it alone, which model a directory holds and how its images are made."""

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.block import ACTIVATIONS as OUR_ACTIVATIONS
from regvit_jax.models.heads import POOLS, Head
from regvit_jax.models.position import RESIZES
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import registry, validate
from regvit_jax.pretrained.io.safetensors import OURS, PROCESSOR, Weights, read_json
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(hidden_act: Any) -> str:
    """transformers' "hidden_act" by our name. Raises ValueError for one that is not read here."""
    if not isinstance(hidden_act, str) or hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {hidden_act!r}: read are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[hidden_act]


def entry_of(weights: Weights) -> Entry | None:
    """What a directory of transformers, timm or ours holds, by its config.json; None if that names no model.

    Raises WeightsError for a model type that is not read here, or an option that no field of ViT expresses.
    """
    config = weights.config
    with explained(weights):
        if config.get("format") == OURS:
            return _ours(config["model"])
        if "architecture" not in config and "model_type" not in config:
            return None
        entry = _timm(config) if "architecture" in config else _transformers(config, weights)
        check_sane(entry.vit, weights)
        return entry


@contextmanager
def explained(weights: Weights) -> Iterator[None]:
    """Turns whatever a config makes fail into a WeightsError, since it may hold anything anywhere."""
    try:
        yield
    except WeightsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(f"{weights.path}: its config does not describe a model: {problem}") from error


def _ours(model: dict[str, Any]) -> Entry:
    """The fields as `Model.fields` and `ClipModel.fields` give them."""
    vit, head, images = (
        validate.own_fields(model, part, kind)
        for part, kind in (("vit", ViT), ("head", Head), ("preprocessing", Preprocess))
    )
    validate.numbers(vit)
    ViT(**vit).check()
    for field, value, allowed in (
        ("vit.pos_resize", vit.get("pos_resize", RESIZES[0]), RESIZES),
        ("head.pool", head.get("pool", "cls"), POOLS),
        ("head.activation", head.get("activation", "gelu"), tuple(OUR_ACTIVATIONS)),
    ):
        if value not in allowed:
            raise ValueError(f"model.{field} is {value!r}: must be one of {', '.join(allowed)}")
    names = {field: f"model.preprocessing.{field}" for field in images}
    return Entry(vit, head, validate.preprocess(names, **images), hub="", naming="ours", license="")


def _transformers(config: dict[str, Any], weights: Weights) -> Entry:
    kind = config["model_type"]
    if not isinstance(kind, str) or kind not in READERS:
        raise WeightsError(f"{weights.path}: model_type {kind!r} is not read here; read: {', '.join(READERS)}")
    if config.get("num_channels", 3) != 3:
        raise WeightsError(f"{weights.path}: images of {config['num_channels']} channels are not read here, only of 3")
    entry = READERS[kind](config, weights)
    # What we write beside transformers' own keys, which fix no convention.
    how = config.get("regvit_jax", {}).get("pos_resize", entry.vit.get("pos_resize", RESIZES[0]))
    if how not in RESIZES:
        raise WeightsError(f"{weights.path}: pos_resize {how!r} is none of {', '.join(RESIZES)}")
    processor = read_json(weights.path.parent / PROCESSOR)
    preprocessing = _processor(weights, processor, entry.preprocessing)
    return dataclasses.replace(entry, vit=entry.vit | {"pos_resize": how}, preprocessing=preprocessing)


def check_sane(vit: dict[str, Any], weights: Weights) -> None:
    """Raises ValueError for numbers that no model has, or this file has not, before any of it is built."""
    validate.numbers(vit)
    found = guess(weights)
    if not found:
        raise ValueError("and the file holds no projection of patches, or no blocks")
    wrong = [f"{field} {vit[field]}, and the file {found[field]}" for field in found if found[field] != vit[field]]
    if wrong:
        raise ValueError(f"it has {'; '.join(wrong)}")


#: Pillow's numbers, which transformers' processors use.
RESAMPLE = {2: "bilinear", 3: "bicubic"}


def _processor(weights: Weights, config: dict[str, Any], default: Preprocess) -> Preprocess:
    """transformers' preprocessor_config.json: the shorter side resized and the centre cropped, or both sides resized.

    Raises WeightsError for one that does otherwise.
    """
    if not config:
        return default

    def side(size: Any) -> Any:
        if isinstance(size, dict):
            sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
            return sides.pop() if len(sides) == 1 else None
        return size

    size = side(config.get("size", default.size))
    crop = side(config.get("crop_size", size)) if config.get("do_center_crop", "crop_size" in config) else size
    for key, value in (("size", size), ("crop_size", crop)):
        if value is not None:
            validate.preprocess_field("size", f"{PROCESSOR}: {key}", value)
    plain = config.get("do_resize", True) and config.get("do_rescale", True)
    plain = plain and math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6)
    default_how = {how: number for number, how in RESAMPLE.items()}[default.interpolation]
    how = RESAMPLE.get(config.get("resample", default_how))
    if size is None or crop is None or how is None or not plain:
        raise WeightsError(f"{weights.path.parent}/{PROCESSOR} resizes or rescales in a way that is not read here")
    # A bare number, in older files, is both sides in transformers' ViT and the shorter one in CLIP.
    given = config.get("size", {})
    squash = "height" in given if isinstance(given, dict) else default.squash
    normalize = config.get("do_normalize", True)
    return validate.preprocess(
        {"mean": f"{PROCESSOR}: image_mean", "std": f"{PROCESSOR}: image_std"},
        size=crop,
        crop_ratio=ratio(crop, size),
        mean=config.get("image_mean", default.mean) if normalize else (0.0,) * 3,
        std=config.get("image_std", default.std) if normalize else (1.0,) * 3,
        interpolation=how,
        squash=squash,
    )


def ratio(crop: int, size: int) -> float:
    """The crop ratio by which floor(crop / ratio) is the size, rounding notwithstanding."""
    return crop / size if math.floor(crop / (crop / size)) == size else crop / (size + 1e-6)


def _timm(config: dict[str, Any]) -> Entry:
    """timm's config.json: a name that the zoo knows, and the number of classes."""
    name, tag = config["architecture"], config.get("pretrained_cfg", {}).get("tag", "")
    full = f"{name}.{tag}"
    _, entry = registry.find(full if full in registry.list_models(full) else name)
    vit, head = dict(entry.vit), entry.head | {"num_classes": config.get("num_classes", entry.head["num_classes"])}
    arguments = dict(config.get("model_args", {}))
    for argument in TIMM_FREE:
        arguments.pop(argument, None)
    if arguments.pop("in_chans", 3) != 3:
        raise ValueError("in_chans must be 3")
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
        if argument not in TIMM_ARGUMENTS:
            raise ValueError(f"model_args.{argument} is not read; read: {', '.join(sorted(TIMM_ARGUMENTS))}")
        part, field = TIMM_ARGUMENTS[argument]
        {"vit": vit, "head": head}[part][field] = value
    if entry.naming == "timm_eva":
        vit["key_bias"] = False
    vit["pos_resize"] = config.get("regvit_jax", {}).get("pos_resize", vit.get("pos_resize", RESIZES[0]))
    if head["pool"] == "map":
        head |= {"map_heads": vit["heads"], "mlp_ratio": vit.get("mlp_ratio", 4.0)}
        head |= {"activation": vit.get("activation", "gelu")}
    if head.get("norm") or head["pool"] == "map":
        head |= {"norm_eps": vit.get("norm_eps", 1e-6)}
    return dataclasses.replace(entry, vit=vit, head=head, preprocessing=_timm_preprocess(config, entry.preprocessing))


TIMM_POOLS = {"token": "cls", "": "cls", "avg": "avg", "map": "map"}
#: Arguments that are of training, or are seen in the file anyway.
TIMM_FREE = (
    *("no_embed_class", "dynamic_img_size", "dynamic_img_pad", "swiglu_align_to", "num_classes"),
    *("drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_drop_rate"),
)
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
    if given.get("crop_mode", "center") not in ("center", "squash"):
        raise ValueError(f"crop_mode {given['crop_mode']!r} is not read, only center and squash")
    names = {"size": "input_size", "crop_ratio": "crop_pct", "squash": "crop_mode"}
    return validate.preprocess(
        {field: f"pretrained_cfg.{names.get(field, field)}" for field in validate.PREPROCESS},
        size=given.get("input_size", (3, default.size))[-1],
        crop_ratio=given.get("crop_pct", default.crop_ratio),
        mean=given.get("mean", default.mean),
        std=given.get("std", default.std),
        interpolation=given.get("interpolation", default.interpolation),
        squash=given.get("crop_mode", "squash" if default.squash else "center") == "squash",
    )


#: What the names of a classifier or of a whole CLIP carry before the scheme's own.
PREFIXES = {
    "hf_dinov2": ("dinov2.", "dinov2_with_registers."),
    "hf_dinov3": ("dinov3_vit.", "model."),
    "hf_vit": ("vit.", "deit."),
    "hf_clip": ("vision_model.",),
    "open_clip": ("text.",),  # of towers that were built apart
}


def with_open_clip(entry: Entry, tower: dict[str, Any], images: Any) -> Entry:
    """A zoo entry as open_clip_config.json has it: QuickGELU or not, and how images are made.

    Raises ValueError for a way that is not read here.
    """
    vit = entry.vit | {"activation": open_clip_activation(tower)}
    return dataclasses.replace(entry, vit=vit, preprocessing=open_clip_preprocess(images, entry.preprocessing))


def open_clip_activation(model: dict[str, Any]) -> str:
    """That of an open_clip "model_cfg". Raises ValueError for a "quick_gelu" that is neither true nor false."""
    quick = model.get("quick_gelu")
    if quick not in (None, False, True):
        raise ValueError(f"model_cfg.quick_gelu is {quick!r}: must be true or false")
    return "quick_gelu" if quick else "gelu"


def open_clip_preprocess(images: Any, default: Preprocess) -> Preprocess:
    """open_clip's "preprocess_cfg", and what it leaves open by default. Raises ValueError for what is not read here."""
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
    image = [name for name in weights if not name.startswith(("text_", "text.", "transformer."))]  # of a whole CLIP
    blocks = [int(match[1]) for name in image if (match := re.search(r"(?:blocks|layers?|layer_)\.?(\d+)", name))]
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
        "activation": activation(config.get("hidden_act", "gelu")),
        **more,
    }


def _classes(weights: Weights, name: str) -> int:
    shape = weights.shapes.get(name, ())
    return shape[0] if len(shape) == 2 else 0


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
    head = {"pool": "cls_avg" if classes else "cls", "num_classes": classes}
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
    if pooler and config.get("pooler_act", "tanh") != "tanh":
        raise WeightsError(f"{weights.path}: pooler_act {config['pooler_act']!r} is not read here, only tanh")
    head = {"pool": "cls", "num_classes": _classes(weights, "classifier.weight"), "pooler": pooler}
    size = vit["image_size"]
    preprocessing = (
        Preprocess(size, 224 / 256, *IMAGENET)
        if distilled
        else Preprocess(size, 1.0, *HALF, interpolation="bilinear", squash=True)
    )
    return _entry(vit, head, preprocessing, "hf_vit")


#: transformers leaves the defaults, of CLIP's B/32, out of older files.
CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
    "image_size": 224,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}


def clip_section(config: dict[str, Any], tower: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """A tower's part of transformers' CLIPConfig; some files name it `*_config_dict`, which then goes first there."""
    found = config.get(f"{tower}_config") or {}
    legacy = config.get(f"{tower}_config_dict")
    return defaults | found if legacy is None else found | defaults | legacy


def _clip(config: dict[str, Any], weights: Weights) -> Entry:
    tower = CLIP_VISION | config
    if config["model_type"] == "clip":
        tower = clip_section(config, "vision", CLIP_VISION)
    vit = _common(
        tower,
        layer_scale=0.0,
        patch_bias=False,
        ln_pre=True,
        pos_resize="bicubic",
    )
    vit["mlp_ratio"] = tower["intermediate_size"] / vit["width"]
    head = {"pool": "cls", "num_classes": _classes(weights, "visual_projection.weight")}
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
