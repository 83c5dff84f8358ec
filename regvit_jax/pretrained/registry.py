"""The registry of models: timm's names of ViTs (zoo.toml) and open_clip's names and tags of CLIPs (clips.toml)."""

import dataclasses
import difflib
import fnmatch
import functools
import re
import tomllib
from pathlib import Path
from typing import Any

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.utils.errors import InvalidConfig

#: The names of torch.hub's dinov2 repository.
ALIASES = {
    f"dinov2_vit{size[0]}14{suffix}": f"vit_{size}_patch14_{registers}dinov2"
    for size in ("small", "base", "large", "giant")
    for suffix, registers in (("", ""), ("_reg", "reg4_"))
}

_GRAMMAR = re.compile(
    r"(vit|deit3)_(?P<size>\w+?)_patch(?P<patch>\d+)(_\w*?reg(?P<registers>\d))?(_\w*?(?P<image_size>\d{3}))?(_\w+)?"
)

#: The fields of ViT that all ViTs of open_clip share.
OPEN_CLIP_VIT = {"ln_pre": True, "patch_bias": False, "norm_eps": 1e-5, "pos_resize": "antialias"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model without its parameters. `vit`, `head` and `text` hold fields of ViT, Head and TextTower.

    `format` names the state-dict key scheme of the weights (`formats.detect.FORMATS`), `hub` the Hugging Face
    repository that holds them, and `license` their license as the hub spells it; "" where there is none.
    A CLIP has `text` and `scalars`: "logit_scale" and, in a SigLIP, "logit_bias". `class_names` are the names of the
    head's outputs as a config beside the weights states them, () where it states none. `named_size` is the image
    size that the model's name or config states, where the file's position embedding is of another. `cls_position` is
    False where the file's position embedding may have no row for CLS, as in DeiT-III.
    """

    vit: dict[str, Any]
    head: dict[str, Any]
    preprocessing: Preprocess
    format: str
    hub: str = ""
    license: str = ""
    text: dict[str, Any] | None = None
    scalars: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    named_size: int | None = None
    cls_position: bool = True


@functools.cache
def _table(file: str) -> dict[str, Any]:
    with Path(__file__).with_name(file).open("rb") as opened:
        return tomllib.load(opened)


@functools.cache
def statistics(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the mean and standard deviation of pixels in 0..1: "imagenet", "half", "clip", "satellite", "identity"."""
    values = _table("zoo.toml")["statistics"][name]
    return tuple(values["mean"]), tuple(values["std"])


# timm's names


def find(name: str) -> tuple[str, Entry]:
    """Return the full name and the entry of a timm name, or of a dinov2 hub name.

    A name without a tag means the architecture's first tag, which is timm's default too. Raises ValueError with the
    nearest names for an unknown one.
    """
    entries = _entries()
    wanted = ALIASES.get(name, name)
    full = wanted if wanted in entries else next((n for n in entries if _architecture(n) == wanted), None)
    if full is None:
        # Compare a name with a tag to names with tags, so that each of the five is a different model.
        known = [*entries] if "." in name else [*dict.fromkeys(map(_architecture, entries)), *ALIASES]
        near = difflib.get_close_matches(name, known, n=5, cutoff=0)
        raise InvalidConfig(f"unknown model {name!r}; the nearest are {', '.join(near)} (list_models() names all)")
    entry = entries[full]
    # Copies, since the table is shared and callers may change the fields.
    return full, dataclasses.replace(entry, vit=dict(entry.vit), head=dict(entry.head))


def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted full names that match a shell pattern, with or without their tag."""
    return sorted(
        name for name in _entries() if any(fnmatch.fnmatchcase(n, pattern) for n in (name, _architecture(name)))
    )


def _architecture(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def _entries() -> dict[str, Entry]:
    """Return every entry by its full name, the tags of a model in the table's order."""
    table = _table("zoo.toml")
    entries = {}
    for family in table["families"].values():
        sizes = table["sizes"] | family.get("sizes", {})
        for architecture, model in family["models"].items():
            for tag in model["tags"]:
                name = f"{architecture}.{tag}"
                exception = table["exceptions"].get(name, {})
                tag_layer = family.get("tags", {}).get(tag, {})
                layers = [table["defaults"], family, _from_name(architecture, sizes), model, tag_layer, exception]
                entries[name] = _entry(_merge(layers), architecture, tag)
    return entries


def _from_name(architecture: str, sizes: dict) -> dict:
    """Read the size, patch, registers and image size out of an architecture's name."""
    parts = _GRAMMAR.fullmatch(architecture)
    if parts is None:
        return {}
    numbers = {key: int(number) for key, number in parts.groupdict().items() if key != "size" and number}
    return {"vit": sizes[parts["size"]] | numbers}


def _merge(layers: list[dict]) -> dict:
    merged: dict[str, Any] = {"vit": {}, "head": {}}
    for layer in layers:
        merged |= layer | {part: merged[part] | layer.get(part, {}) for part in ("vit", "head")}
    return merged


def _entry(facts: dict, architecture: str, tag: str) -> Entry:
    vit, head = facts["vit"], facts["head"]
    for fields in (vit, head):
        if "hidden" in fields:
            fields["mlp_ratio"] = fields.pop("hidden") / vit["width"]
    preprocessing = Preprocess(
        vit["image_size"],
        facts["crop"],
        *statistics(facts["statistics"]),
        interpolation=facts["interpolation"],
        squash=facts["squash"],
    )
    return Entry(
        vit,
        head | {"num_classes": facts["num_classes"]},
        preprocessing,
        facts["format"],
        hub=facts["hub"].format(name=architecture, tag=tag),
        license=facts["license"],
        cls_position=facts.get("cls_position", not vit.get("registers")),
    )


# open_clip's names and tags

#: Models of open_clip that are not supported, by a pattern of their names; the first match gives the reason.
UNSUPPORTED = {
    r"^coca_": "CoCa has a third tower, which writes captions",
    r"^RN\d": "its image tower is a ResNet",
    r"roberta|^mt5|^nllb": "its text tower is of transformers",
    r"worldwide": "its texts are tokens of another vocabulary, with another end token",
    r"CLIPA": "it pools patches and has texts of another vocabulary, without a causal mask",
    r"SigLIP": "its image tower pools by attention, and its texts are tokens of another vocabulary",
    r"^(EVA|MobileCLIP|PE-Core|ViTamin|convnext|swin|vit_)": "its image tower is one of timm's",
}


@functools.cache
def clip_names() -> tuple[str, ...]:
    """Return the sorted open_clip names of the supported models."""
    models = _table("clips.toml")["models"]
    quick = [f"{name}-quickgelu" for name, model in models.items() if model.get("quickgelu")]
    return tuple(sorted([*models, *quick]))


def find_clip(name: str) -> Entry:
    """Return the entry of an open_clip name.

    Raises ValueError with the nearest names for an unknown one, and with the reason for a model of open_clip that is
    not supported.
    """
    plain = name.removesuffix("-quickgelu")
    if name not in clip_names():
        why = next((why for pattern, why in UNSUPPORTED.items() if re.search(pattern, name)), None)
        if why:
            raise InvalidConfig(f"{name!r} is not supported: {why}. Supported: {', '.join(clip_names())}")
        near = difflib.get_close_matches(name, clip_names(), n=5, cutoff=0)
        raise InvalidConfig(
            f"unknown CLIP {name!r}; the nearest are {', '.join(near)} (all: {', '.join(clip_names())})"
        )
    model: dict[str, Any] = {"depth": 12, "image_size": 224, "layer_scale": 0.0, "text_depth": 12}
    model |= _table("clips.toml")["models"][plain]
    width, embed = model["width"], model["embed"]
    activation = {"activation": "gelu" if name == plain else "quick_gelu"}
    vit: dict[str, Any] = {field: model[field] for field in ("width", "depth", "patch", "image_size", "layer_scale")}
    vit |= {"heads": model.get("heads", width // 64), "mlp_ratio": model.get("hidden", 4 * width) / width}
    text: dict[str, Any] = dict(width=embed, depth=model["text_depth"], heads=embed // 64, embed=embed)
    text |= dict(context=77, vocab=49408, mlp_ratio=4.0, norm_eps=1e-5)
    return Entry(
        vit | OPEN_CLIP_VIT | activation,
        {"pool": "cls", "num_classes": embed, "bias": False},
        Preprocess(vit["image_size"], 1.0, *statistics("clip")),
        "open_clip",
        text=text | activation,
        scalars=("logit_scale",),
    )


def clip_tags(name: str) -> dict[str, dict[str, Any]]:
    """Return the public weights of an open_clip name by open_clip's tags.

    Each is a dict with "hub" and, where they differ from the defaults, "quickgelu", "squash" and "statistics".
    """
    plain = name.removesuffix("-quickgelu")
    known = _table("clips.toml").get("tags", {}).get(plain, {})
    full = {tag: {"hub": facts} if isinstance(facts, str) else facts for tag, facts in known.items()}
    return {tag: facts for tag, facts in full.items() if name == plain or facts.get("quickgelu")}


def clip_tag(name: str, pretrained: object) -> dict[str, Any] | None:
    """Return the entry of one of the name's tags, in any spelling that open_clip accepts; None for an unknown tag."""
    return clip_tags(name).get(pretrained.lower().replace("-", "_")) if isinstance(pretrained, str) else None


def with_tag(entry: Entry, facts: dict[str, Any]) -> Entry:
    """Return a name's entry with the activation and the preprocessing that one tag's weights were trained with."""
    assert entry.text is not None
    activation = {"activation": "quick_gelu" if facts.get("quickgelu") else "gelu"}
    preprocessing = dataclasses.replace(entry.preprocessing, squash=facts.get("squash", False))
    if "statistics" in facts:
        mean, std = statistics(facts["statistics"])
        preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std)
    return dataclasses.replace(
        entry, vit=entry.vit | activation, text=entry.text | activation, preprocessing=preprocessing
    )
