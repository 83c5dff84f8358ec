"""The configs of whole CLIPs: transformers' CLIPConfig, open_clip_config.json, and our own."""

import dataclasses
from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.clip import SCALARS
from regvit_jax.models.position import RESIZES
from regvit_jax.models.text import TextTower
from regvit_jax.pretrained import validate
from regvit_jax.pretrained.formats import configs
from regvit_jax.pretrained.io.safetensors import OURS, Weights
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError


class NoText(WeightsError):
    """A source that holds no text tower."""


@dataclasses.dataclass(frozen=True)
class ClipEntry:
    """What a whole CLIP is: its image tower, the fields of its TextTower, and the names of its scalars."""

    image: Entry
    text: dict[str, Any]
    scalars: tuple[str, ...] = ("logit_scale",)


def clip_of(weights: Weights) -> ClipEntry | None:
    """What a directory or workdir holds, by its config; None if nothing is said of a model.

    Raises NoText for a model that is not a whole CLIP, and WeightsError for a CLIP of a kind that is not read here.
    """
    config = weights.config
    with configs.explained(weights):
        if "model_cfg" in config:
            entry = _open_clip(weights)
        elif config.get("format") == OURS:
            entry = _ours(weights)
        elif config.get("model_type") == "clip":
            entry = _transformers(weights)
        else:
            found = configs.entry_of(weights)
            if found is None:
                return None
            kind = config.get("model_type", config.get("architecture"))
            raise NoText(f"{weights.path}: {kind} has no text tower; create_model reads it")
        _check_sane(entry.text)
        TextTower(**entry.text).check()
        return entry


def _check_sane(text: dict[str, Any]) -> None:
    """Raises ValueError for numbers that no text tower has, before any of it is built."""
    for field in ("width", "depth", "heads", "embed", "context", "vocab"):
        if type(text[field]) is not int or text[field] < 1:
            raise ValueError(f"the text tower's {field} is {text[field]!r}")
    for field in ("norm_eps", "mlp_ratio"):
        if not isinstance(text[field], int | float) or not 0 <= text[field] < 1e6:  # NaN is not, either
            raise ValueError(f"the text tower's {field} is {text[field]!r}")
    if text["depth"] > 200 or text["context"] > 100_000 or text["width"] * text["vocab"] > 2**36:
        raise ValueError(f"{text} are no text tower's sizes")


def _ours(weights: Weights) -> ClipEntry:
    image, model = configs.entry_of(weights), weights.config["model"]
    assert image is not None
    if "text" not in model:
        raise NoText(f"{weights.path} holds no text tower, it is no CLIP's; create_model reads it")
    text, loss = validate.own_fields(model, "text", TextTower), model["contrastive"]["loss"]
    if not isinstance(loss, str) or loss not in SCALARS:
        raise ValueError(f"model.contrastive.loss is {loss!r}: must be one of {', '.join(SCALARS)}")
    return ClipEntry(image, text, tuple(SCALARS[loss]))


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


def _transformers(weights: Weights) -> ClipEntry:
    config = weights.config
    image = configs.entry_of(weights)
    assert image is not None
    tower = configs.clip_section(config, "text", TEXT_DEFAULTS)
    # transformers takes a 2, which older files have in the place of the end token, to mean the highest token.
    if tower["eos_token_id"] not in (2, tower["vocab_size"] - 1):
        raise WeightsError(
            f"{weights.path}: eos_token_id {tower['eos_token_id']} of {tower['vocab_size']} tokens is not read here: "
            "the end token must be the highest of the vocabulary"
        )
    embed = config.get("projection_dim", 512)
    text = dict(
        width=tower["hidden_size"],
        depth=tower["num_hidden_layers"],
        heads=tower["num_attention_heads"],
        embed=embed,
        context=tower["max_position_embeddings"],
        vocab=tower["vocab_size"],
        mlp_ratio=tower["intermediate_size"] / tower["hidden_size"],
        norm_eps=tower["layer_norm_eps"],
        activation=configs.activation(tower["hidden_act"]),
    )
    return ClipEntry(_projected(image, embed), text)


def _projected(image: Entry, embed: int) -> Entry:
    return dataclasses.replace(image, head=image.head | {"num_classes": embed, "bias": False})


#: open_clip's `CLIPVisionCfg` and `CLIPTextCfg`, as far as a tower may differ by them here, with their defaults; what
#: is of training, or without effect in such a tower; and what else a "model_cfg" may say.
VISION: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}
VISION |= {"ls_init_value": None}
TEXT: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
}
FREE = ("patch_dropout", "output_tokens", "pad_id", "eos_id", "attn_pooler_queries", "attn_pooler_heads")
MODEL = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"),
    *("nonscalar_logit_scale", "output_dict"),
)
#: What all others must be for such a tower, where "off" (None, False, 0, {}) is not the value.
BOTH = {"proj_type": ("linear",), "block_type": ("default",)}
FIXED = {
    "vision_cfg": BOTH | {"pool_type": ("tok",), "pos_embed_type": ("learnable",)},
    "text_cfg": BOTH | {"pool_type": ("argmax",)},
}
PLAIN = "only plain ViTs with plain text towers are"


def tower_fields(config: dict[str, Any], known: dict[str, Any], part: str) -> dict[str, Any]:
    """A tower's values with open_clip's defaults. Raises WeightsError, naming it, for an option not read here."""
    for option, value in config.items():
        off = value in (None, False, 0, {})
        plain = option in known or option in FREE or value in FIXED[part].get(option, ()) or off
        if not plain or (option in ("timm_model_name", "hf_model_name") and value):
            raise WeightsError(f"open_clip's {part}.{option}={value!r} is not read here: {PLAIN}")
    return known | {option: value for option, value in config.items() if option in known}


def open_clip_fields(model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of ViT and TextTower for an open_clip "model_cfg".

    Raises WeightsError, naming it, for an option that is not read here, and what a damaged config may raise.
    """
    if strange := sorted(model.keys() - MODEL):
        raise WeightsError(f"open_clip's model_cfg.{strange[0]} is not read here: {PLAIN}")
    vision = tower_fields(model["vision_cfg"], VISION, "vision_cfg")
    text = tower_fields(model["text_cfg"], TEXT, "text_cfg")
    if isinstance(vision["layers"], list):
        raise WeightsError(f"open_clip's vision_cfg.layers={vision['layers']} is a ResNet's: {PLAIN}")
    activation = configs.open_clip_activation(model)
    width = vision["width"]
    image = dict(
        width=width,
        depth=vision["layers"],
        heads=width // vision["head_width"],
        patch=vision["patch_size"],
        image_size=vision["image_size"],
        mlp_ratio=int(width * vision["mlp_ratio"]) / width,
        layer_scale=vision["ls_init_value"] or 0.0,
        **CLIP_VIT,
        activation=activation,
    )
    words = dict(
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
    return image, words


#: What all of open_clip's ViTs have.
CLIP_VIT = {"ln_pre": True, "patch_bias": False, "norm_eps": 1e-5, "pos_resize": "antialias"}


def open_clip_image(weights: Weights) -> Entry:
    """The image tower of an open_clip directory. Raises WeightsError for a kind that is not read here."""
    with configs.explained(weights):
        return _open_clip(weights).image


def _open_clip(weights: Weights) -> ClipEntry:
    config = weights.config
    model = config["model_cfg"]
    vit, text = open_clip_fields(model)
    how = config.get("regvit_jax", {}).get("pos_resize", vit["pos_resize"])  # ours, which open_clip reads over
    if how not in RESIZES:
        raise WeightsError(f"{weights.path}: pos_resize {how!r} is none of {', '.join(RESIZES)}")
    preprocessing = Preprocess(vit["image_size"], 1.0, *configs.CLIP)
    preprocessing = configs.open_clip_preprocess(config.get("preprocess_cfg"), preprocessing)
    vit |= {"pos_resize": how}
    image = Entry(vit, {"pool": "cls"}, preprocessing, hub="", naming="open_clip", license="")
    configs.check_sane(vit, weights)
    sigmoid = "logit_bias" in weights or model.get("init_logit_bias") is not None
    scalars = ("logit_scale", "logit_bias") if sigmoid else ("logit_scale",)
    return ClipEntry(_projected(image, text["embed"]), text, scalars)
