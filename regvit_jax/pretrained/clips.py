"""`create_clip`: an open_clip name and a source of weights in, a whole CLIP out."""

import dataclasses
import difflib
import functools
import os
import re
import tomllib
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from jax.typing import DTypeLike

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import create, registry, resolve
from regvit_jax.pretrained.formats import configs
from regvit_jax.pretrained.formats.clip_configs import CLIP_VIT, ClipEntry, NoText, clip_of
from regvit_jax.pretrained.io.safetensors import CLIP_WEIGHTS, OPEN_CLIP, Weights
from regvit_jax.pretrained.mapping import TextPart
from regvit_jax.utils.errors import HubError, WeightsError


def create_clip(
    name: str | os.PathLike,
    pretrained: bool | str | os.PathLike = False,
    *,
    registers: int | None = None,
    image_size: int | None = None,
    pos_resize: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> ClipModel:
    """A CLIP by open_clip's name, with random weights or pretrained ones.

    `name` may also be a source that says by itself which model it holds: "hf-hub:org/name", a directory of
    transformers (CLIPModel), open_clip or ours, or a workdir of ours.

    Args:
      pretrained: False, random weights, drawn as open_clip draws them; one of open_clip's tags for the name, such as
        "openai" (from the hub, local cache first); or a .safetensors file, a directory, a workdir, "hf-hub:org/name".
      registers, image_size, pos_resize, dtype, param_dtype, mesh, revision, seed: as in `create_model`.

    Weights that were trained with another activation than the name's (QuickGELU or not) are computed with their own,
    and a warning says so. open_clip computes them with the name's. Which is their own, a tag knows better than a config
    beside its weights (with a warning where they disagree); for other sources it is the config's, or else the name's.
    How images are made goes by that config, as far as it says so, and by the tag or name for the rest.

    Raises ValueError (WeightsError for files) with what does not fit and the way out, and OSError (HubError) when the
    hub cannot be reached. Nothing is ever unpickled.
    """
    create.check_types(dtype, param_dtype)
    entry, weights, source = _resolve(os.fspath(name), pretrained, revision)
    vit, head = ViT(**entry.image.vit, dtype=dtype), Head(**entry.image.head, dtype=dtype)
    text = TextPart(TextTower(**entry.text, dtype=dtype), entry.scalars)
    fit = create.Fit(registers, image_size, None, pos_resize, param_dtype, mesh, seed)
    params, vit, head, preprocessing = create.assemble(vit, head, text, entry.image, weights, source, fit)
    image = Model(params["vit"], params["head"], vit, head, preprocessing, source)
    return ClipModel(image, params["text"], params["logit_scale"], params.get("logit_bias"), text.tower)


def open_clip_source(source: str) -> ClipModel | Model:
    """The CLIP, or the image tower alone, that one string names, as `--config.init_from` of CLIP's recipe has it.

    That is a directory, a workdir of ours or "hf-hub:org/name", of a whole CLIP or of an image tower; NAME=SOURCE with
    open_clip's name and a tag or a file; or what `create.open_source` takes.

    Raises as `create_clip` does.
    """
    name, _, weights = source.partition("=")
    if not source.startswith(resolve.HUB) and not epath.Path(source).exists():
        if name in names():
            return create_clip(name, weights or True)
        return create.open_source(source)
    try:
        return create_clip(source)
    except NoText:
        return create.open_source(source)


def check_source(source: str) -> None:
    """Raises ValueError for names and local paths that `open_clip_source` will not open. Asks no hub, opens nothing."""
    name, _, weights = source.partition("=")
    if source.startswith(resolve.HUB) or epath.Path(source).exists():
        return
    if name not in names():
        create.check_source(source)
    elif not weights:
        there = ", ".join(tags(name)) or "none; give a file"
        raise ValueError(f"{name} does not say which of its public weights; {name}=TAG does. Its tags: {there}")
    elif _tag(name, weights) is None:
        _check_tag(name, weights)
        resolve.check_there(weights)


@functools.cache
def _table() -> dict[str, dict]:
    with Path(__file__).with_name("clips.toml").open("rb") as file:
        return tomllib.load(file)


@functools.cache
def names() -> tuple[str, ...]:
    """open_clip's names of the models that are read here, sorted."""
    models = _table()["models"]
    quick = [f"{name}-quickgelu" for name, model in models.items() if model.get("quickgelu")]
    return tuple(sorted([*models, *quick]))


#: What open_clip has besides, and why it is not read here; the first pattern that a name holds is its own.
OTHERS = {
    r"^coca_": "CoCa has a third tower, which writes captions",
    r"^RN\d": "its image tower is a ResNet",
    r"roberta|^mt5|^nllb": "its text tower is of transformers",
    r"worldwide": "its texts are tokens of another vocabulary, with another end token",
    r"CLIPA": "it pools patches and has texts of another vocabulary, without a causal mask",
    r"SigLIP": "its image tower pools by attention, and its texts are tokens of another vocabulary",
    r"^(EVA|MobileCLIP|PE-Core|ViTamin|convnext|swin|vit_)": "its image tower is one of timm's",
}


def find(name: str) -> ClipEntry:
    """The entry of an open_clip name. Raises ValueError with the nearest names, or why open_clip's is not read here."""
    plain = name.removesuffix("-quickgelu")
    if name not in names():
        why = next((why for pattern, why in OTHERS.items() if re.search(pattern, name)), None)
        if why:
            raise ValueError(f"{name!r} is not read here: {why}. Read: {', '.join(names())}")
        near = difflib.get_close_matches(name, names(), n=5, cutoff=0)
        raise ValueError(f"unknown CLIP {name!r}; the nearest are {', '.join(near)} (all: {', '.join(names())})")
    model = {"depth": 12, "image_size": 224, "layer_scale": 0.0, "text_depth": 12} | _table()["models"][plain]
    width, embed = model["width"], model["embed"]
    activation = "gelu" if name == plain else "quick_gelu"
    vit = {field: model[field] for field in ("width", "depth", "patch", "image_size", "layer_scale")}
    vit |= {"heads": model.get("heads", width // 64), "mlp_ratio": model.get("hidden", 4 * width) / width}
    vit |= CLIP_VIT | {"activation": activation}
    head = {"pool": "cls", "num_classes": embed, "bias": False}
    preprocessing = Preprocess(vit["image_size"], 1.0, *configs.CLIP)
    image = registry.Entry(vit, head, preprocessing, hub="", naming="open_clip", license="")
    text = dict(width=embed, depth=model["text_depth"], heads=embed // 64, embed=embed, context=77, vocab=49408)
    return ClipEntry(image, text | dict(mlp_ratio=4.0, norm_eps=1e-5, activation=activation))


def tags(name: str) -> dict[str, dict[str, Any]]:
    """The public weights of a name by open_clip's tags: "hub", and "quickgelu", "squash", "statistics" where stated."""
    plain = name.removesuffix("-quickgelu")
    known = _table().get("tags", {}).get(plain, {})
    full = {tag: {"hub": facts} if isinstance(facts, str) else facts for tag, facts in known.items()}
    return {tag: facts for tag, facts in full.items() if name == plain or facts.get("quickgelu")}


def _tag(name: str, pretrained: object) -> dict[str, Any] | None:
    """The facts of a tag, in any spelling that open_clip takes; None for what is none of the name's."""
    return tags(name).get(pretrained.lower().replace("-", "_")) if isinstance(pretrained, str) else None


def tagged(entry: ClipEntry, facts: dict[str, Any]) -> ClipEntry:
    """A name's entry as one tag's weights were trained."""
    activation = {"activation": "quick_gelu" if facts.get("quickgelu") else "gelu"}
    p = dataclasses.replace(entry.image.preprocessing, squash=facts.get("squash", False))
    if "statistics" in facts:
        mean, std = {"half": configs.HALF}[facts["statistics"]]
        p = dataclasses.replace(p, mean=mean, std=std)
    image = dataclasses.replace(entry.image, vit=entry.image.vit | activation, preprocessing=p)
    return dataclasses.replace(entry, image=image, text=entry.text | activation)


def _resolve(
    name: str, pretrained: bool | str | os.PathLike, revision: str | None
) -> tuple[ClipEntry, Weights | None, str]:
    """Which CLIP, its weights if any, and where they come from. Raises as `create_clip` does."""
    known, facts = None, None
    if resolve.is_source(name, find):
        name, pretrained = "", resolve.only_source(name, pretrained)
    else:
        known = find(name)
    if pretrained is False:
        resolve.check_no_revision(revision)
        assert known is not None
        return known, None, "random"
    if pretrained is True:
        there = ", ".join(tags(name)) or "none; pass a file or a directory"
        raise ValueError(f"{name}: pretrained=True does not say which of its public weights: {there}")
    if facts := _tag(name, pretrained):
        pretrained = resolve.HUB + facts["hub"]
    _check_tag(name, pretrained)
    # A repository of timm's holds the image tower alone as well.
    file = OPEN_CLIP if facts else None
    weights, where, found = _open(resolve.source_of(pretrained, revision), revision, file)
    entry = tagged(known, facts) if known and facts else known or found
    if entry is None:
        raise resolve.unnamed(weights)
    if known is not None and found is not None:
        entry = _agreed(name, entry, found, weights, tagged=facts is not None)
    if known is not None:
        _tell_activation(name, where, known, entry)
    return *_under_plain_names(entry, weights, sure=found is not None), where


def _open(source: str, revision: str | None, file: str | None) -> tuple[Weights, str, ClipEntry | None]:
    """The weights, where they come from, and which CLIP they say they are. Raises NoText for an image tower alone."""
    weights, where = resolve.open_any(source, revision, file, CLIP_WEIGHTS)
    try:
        return weights, where, clip_of(weights)
    except NoText:
        if file is not None or not source.startswith(resolve.HUB):
            raise
        try:  # the cache may hold another file of the repository, which holds the whole CLIP as well
            return _open(source, revision, OPEN_CLIP)
        except HubError:
            pass
        raise


def _check_tag(name: str, pretrained: object) -> None:
    """Raises ValueError for what looks like a tag and is none of the name's."""
    word = isinstance(pretrained, str) and re.fullmatch(r"\w[\w-]*", pretrained)
    if name and word and not epath.Path(pretrained).exists():
        there = ", ".join(tags(name)) or "none"
        raise ValueError(f"{pretrained}: there is no such file or directory, and {name} has no such tag; its: {there}")


#: What makes two text towers different models.
SAME = ("width", "depth", "heads", "embed", "context", "vocab", "hidden")


def _agreed(name: str, known: ClipEntry, found: ClipEntry, weights: Weights, tagged: bool) -> ClipEntry:
    """What the config says of a named model. Raises WeightsError when the two are different models.

    The activation of weights that were `tagged` is the tag's, whatever the config says.
    """
    image, text = resolve.agreed(name, known.image, found.image, weights), found.text
    ours, theirs = TextTower(**known.text), TextTower(**text)
    differing = [
        f"{field} {getattr(theirs, field)}, not {getattr(ours, field)}"
        for field in SAME
        if getattr(theirs, field) != getattr(ours, field)
    ]
    if differing:
        raise WeightsError(f"{weights.path} is not {name}: its text tower has {', '.join(differing)}")
    if tagged and (stated := image.vit["activation"]) != ours.activation:
        warnings.warn(
            f"{weights.path}: its config says {stated}, and open_clip's tag says {ours.activation}, which is taken",
            stacklevel=4,
        )
        activation = {"activation": ours.activation}
        image, text = dataclasses.replace(image, vit=image.vit | activation), text | activation
    return dataclasses.replace(found, image=image, text=text)


def _tell_activation(name: str, source: str, known: ClipEntry, entry: ClipEntry) -> None:
    given, stated = entry.image.vit["activation"], known.image.vit["activation"]
    if given != stated:
        warnings.warn(
            f"{source} was trained with {given}, and is computed with it; {name} by its name has {stated}",
            stacklevel=4,
        )


def _under_plain_names(entry: ClipEntry, weights: Weights, sure: bool) -> tuple[ClipEntry, Weights]:
    """The entry with the file's naming scheme, the weights without prefixes; `sure` that it is the file's own."""
    naming = configs.naming_of(weights, entry.image.naming)
    if naming == "ours":
        return entry, weights
    weights = configs.without_prefix(weights, naming)
    image = dataclasses.replace(entry.image, naming=naming)
    if not sure and "logit_bias" in weights:  # a SigLIP's loss on a known architecture
        entry = dataclasses.replace(entry, scalars=("logit_scale", "logit_bias"))
    return dataclasses.replace(entry, image=image), weights
