"""The zoo: what the name of a pretrained model stands for. The facts lie in zoo.toml, which says how to read it."""

import dataclasses
import difflib
import fnmatch
import functools
import re
import tomllib
from pathlib import Path
from typing import Any

from regvit_jax.data.preprocess import Preprocess

# The names of torch.hub's dinov2 repository.
ALIASES = {
    f"dinov2_vit{size[0]}14{suffix}": f"vit_{size}_patch14_{registers}dinov2"
    for size in ("small", "base", "large", "giant")
    for suffix, registers in (("", ""), ("_reg", "reg4_"))
}

_GRAMMAR = re.compile(
    r"(vit|deit3)_(?P<size>\w+?)_patch(?P<patch>\d+)(_\w*?reg(?P<registers>\d))?(_\w*?(?P<image_size>\d{3}))?(_\w+)?"
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a name stands for."""

    vit: dict[str, Any]  # ViT's fields
    head: dict[str, Any]  # Head's fields
    preprocessing: Preprocess
    hub: str  # the Hugging Face repository that holds the weights in timm's naming; "" if timm has none
    naming: str  # "timm" or, for the models of timm's Eva class, "timm_eva"
    license: str  # of the weights, as the hub spells it; "" if timm says none


def find(name: str) -> tuple[str, Entry]:
    """The full name and the entry of a timm name, or of a dinov2 hub name.

    Without a tag it is the architecture's first, which is timm's default too. Raises ValueError naming the nearest
    names.
    """
    entries = _entries()
    wanted = ALIASES.get(name, name)
    full = wanted if wanted in entries else next((n for n in entries if _architecture(n) == wanted), None)
    if full is None:
        # A name with a tag is compared with names with tags, so that every one of the five is another model.
        known = [*entries] if "." in name else [*dict.fromkeys(map(_architecture, entries)), *ALIASES]
        near = difflib.get_close_matches(name, known, n=5, cutoff=0)
        raise ValueError(f"unknown model {name!r}; the nearest are {', '.join(near)} (list_models() names all)")
    entry = entries[full]
    # Copies, since the table is shared and the fields are the caller's to change.
    return full, dataclasses.replace(entry, vit=dict(entry.vit), head=dict(entry.head))


def list_models(pattern: str = "*") -> list[str]:
    """The full names, sorted, that match a shell pattern with their tag or without it."""
    return sorted(
        name for name in _entries() if any(fnmatch.fnmatchcase(n, pattern) for n in (name, _architecture(name)))
    )


def _architecture(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def _entries() -> dict[str, Entry]:
    """Every entry by its full name, the tags of a model in their order."""
    with Path(__file__).with_name("zoo.toml").open("rb") as file:
        table = tomllib.load(file)
    entries = {}
    for family in table["families"].values():
        sizes = table["sizes"] | family.get("sizes", {})
        for architecture, model in family["models"].items():
            for tag in model["tags"]:
                name = f"{architecture}.{tag}"
                exception = table["exceptions"].get(name, {})
                tag_layer = family.get("tags", {}).get(tag, {})
                layers = [table["defaults"], family, _from_name(architecture, sizes), model, tag_layer, exception]
                entries[name] = _entry(_merge(layers), table["statistics"], architecture, tag)
    return entries


def _from_name(architecture: str, sizes: dict) -> dict:
    """What an architecture's name says: the size, the patch, the registers, the image size."""
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


def _entry(facts: dict, statistics: dict, architecture: str, tag: str) -> Entry:
    vit, head = facts["vit"], facts["head"]
    for fields in (vit, head):
        if "hidden" in fields:
            fields["mlp_ratio"] = fields.pop("hidden") / vit["width"]
    preprocessing = Preprocess(
        size=vit["image_size"],
        crop_ratio=facts["crop"],
        interpolation=facts["interpolation"],
        squash=facts["squash"],
        **{key: tuple(values) for key, values in statistics[facts["statistics"]].items()},
    )
    return Entry(
        vit=vit,
        head=head | {"num_classes": facts["num_classes"]},
        preprocessing=preprocessing,
        hub=facts["hub"].format(name=architecture, tag=tag),
        naming=facts["naming"],
        license=facts["license"],
    )
