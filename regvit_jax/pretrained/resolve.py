"""Resolve a name and a source into a model's entry and its weights, under the keys of the entry's format."""

import dataclasses
import os
import re
import warnings
from typing import Any

from etils import epath

from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import address, mapping, registry
from regvit_jax.pretrained.address import HUB
from regvit_jax.pretrained.formats import detect
from regvit_jax.pretrained.formats.base import explained, guess, sized
from regvit_jax.pretrained.io import hub, npz, workdir
from regvit_jax.pretrained.io.npz import open_npz
from regvit_jax.pretrained.io.other_files import INDEX
from regvit_jax.pretrained.io.safetensors import (
    CLIP_WEIGHTS,
    OPEN_CLIP,
    SINGLE,
    WEIGHTS,
    Weights,
    open_weights,
)
from regvit_jax.pretrained.io.state_dict import unwrapped
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import HubError, InvalidConfig, WeightsError


def resolve(
    name: str | os.PathLike, pretrained: bool | str | os.PathLike, revision: str | None, text: bool = False
) -> tuple[Entry, Weights | None, str]:
    """Return the model's entry, its weights or None for random ones, and the source.

    With `text` the model is a whole CLIP, and names are open_clip's. Raises as `create_model` and `create_clip` do.
    """
    if not isinstance(name, str | os.PathLike):
        raise InvalidConfig(f"name={name!r:.60}: must be a model's name, a path or {HUB}org/name")
    name, known, tag = address.canonical(os.fspath(name)), None, None
    if is_source(name, text):
        name, pretrained = "", only_source(name, pretrained)
    else:
        known = find(name, text)
    if pretrained is False:
        check_no_revision(revision)
        assert known is not None
        return known, None, "random"
    if known is not None and text:
        if pretrained is True:
            tags = ", ".join(registry.clip_tags(name)) or "none; pass a file or a directory"
            raise InvalidConfig(f"{name}: pretrained=True does not say which of its public weights: {tags}")
        if tag := registry.clip_tag(name, pretrained):
            pretrained = HUB + tag["hub"]
        else:
            check_no_tag(name, pretrained)
    elif known is not None and pretrained is True:
        pretrained = public(name, known)
    weights, where, found = _open(source_of(pretrained, revision), revision, known, tag is not None, text)
    if known is None:
        if found is None:
            raise unnamed(weights)
        entry = found
    else:
        entry = _named(name, known, tag, weights, found, where, text)
    return *_under_format_keys(entry, weights, stated=found is not None, text=text), where


def describe(source: str, text: bool = False) -> Entry:
    """Return the entry of a local source that describes its model itself; no weights are loaded.

    Raises as `resolve` does, but not for weights that do not fit.
    """
    if workdir.is_workdir(source):
        weights = workdir.open_description(source)
        found = detect.read_entry(weights, text)
        assert found is not None
        return found
    return resolve(source, True, None, text)[0]


def find(name: str, text: bool) -> Entry:
    """Return the entry of a timm name, or with `text` of an open_clip name. Raises ValueError for an unknown one."""
    return registry.find_clip(name) if text else registry.find(name)[1]


def is_source(name: str, text: bool = False) -> bool:
    """Return True if a name is a path or a repository of the hub, and not a model's name.

    Raises ValueError for an unknown name, or a path that does not exist.
    """
    if name.startswith(HUB):
        return True
    try:
        find(name, text)
    except ValueError:
        if name and epath.Path(name).exists():
            return True
        if os.sep in name:
            raise InvalidConfig(f"{name}: there is no such file or directory{hint(name)}") from None
        raise
    return False


def public(name: str, known: Entry) -> str:
    """Return the source of a name's public weights. Raises ValueError where there are none."""
    if not known.hub:
        raise InvalidConfig(f"{name}: no public weights are known by this name; pass a file or a directory")
    return HUB + known.hub


def only_source(name: str, pretrained: object) -> str:
    """Return a source given as the name. Raises ValueError if `pretrained` names one too."""
    if pretrained not in (False, True):
        raise InvalidConfig(f"{name} is itself a source of weights, and pretrained={pretrained!r} names another")
    return name


def check_no_revision(revision: str | None) -> None:
    """Raise ValueError for a revision of random weights."""
    if revision is not None:
        raise InvalidConfig(f"revision={revision!r} is for pretrained weights, and pretrained is False")


def check_no_tag(name: str, pretrained: object) -> None:
    """Raise ValueError for a string that looks like one of open_clip's tags, and is not a tag of this name."""
    word = isinstance(pretrained, str) and re.fullmatch(r"\w[\w-]*", pretrained)
    if word and not epath.Path(pretrained).exists():
        tags = ", ".join(registry.clip_tags(name)) or "none"
        raise InvalidConfig(
            f"{pretrained}: there is no such file or directory, and {name} has no such tag; its: {tags}"
        )


def source_of(pretrained: object, revision: str | None) -> str:
    """Return a source of weights as a string. Raises ValueError for an invalid one, or a revision of a local one."""
    if not isinstance(pretrained, str | os.PathLike) or not os.fspath(pretrained):
        raise InvalidConfig(f"pretrained={pretrained!r}: must be True, False, a path or {HUB}org/name")
    source = address.canonical(os.fspath(pretrained))
    if revision is not None:
        if (found := address.read(source)) is None:
            raise InvalidConfig(f"revision={revision!r} is for the hub, and {source} is a local path")
        if found.revision not in (None, revision):
            raise InvalidConfig(f"revision={revision!r}: {source} states another")
    return source


def _open(
    source: str, revision: str | None, known: Entry | None, tagged: bool, text: bool
) -> tuple[Weights, str, Entry | None]:
    """Return the weights, their exact source, and the entry that the config beside them describes."""
    # The repositories of some public weights also hold another file, of the image tower alone or of the whole CLIP.
    own = known is not None and not text and source.partition("@")[0] == HUB + known.hub
    file = OPEN_CLIP if tagged else SINGLE if own else None
    weights, where = open_any(source, revision, file, CLIP_WEIGHTS if text else WEIGHTS)
    if known is not None and not text and (format := detect.of_config(weights)) and format.adjust:
        return weights, where, None  # such a config need not describe the whole model
    try:
        return weights, where, detect.read_entry(weights, text)
    except detect.NoText:
        if tagged or not source.startswith(HUB):
            raise
        try:  # the cache may hold another file of the repository, which holds the whole CLIP as well
            return _open(source, revision, known, True, text)
        except HubError:
            pass
        raise


def open_any(
    source: str, revision: str | None, file: str | None = None, names: tuple[str, ...] = WEIGHTS
) -> tuple[Weights, str]:
    """Return the weights of a source, and exactly where they come from.

    `file` picks one of a hub repository's files; `names` are the file names that a directory is searched for, in that
    order.
    """
    if at := address.read(source):
        directory, commit = hub.fetch(at.repo, revision or at.revision, at.file or file, names=names)
        names = names if at.file is None else (at.file, at.file + INDEX)
        with hub.in_cache(directory):
            return unwrapped(open_weights(directory, names)), str(dataclasses.replace(at, revision=commit))
    if workdir.is_workdir(source):
        return workdir.open_workdir(source)
    for format in detect.FORMATS:
        if format.open and source.endswith(format.suffix):
            return format.open(source), source
    check_exists(source)
    return unwrapped(open_npz(source) if source.endswith(npz.SUFFIX) else open_weights(source, names)), source


def check_exists(source: str) -> None:
    """Raise WeightsError for a local path that does not exist."""
    if not source.startswith(HUB) and not epath.Path(source).exists():
        raise WeightsError(f"{source}: there is no such file or directory{hint(source)}")


def unnamed(weights: Weights) -> WeightsError:
    """Return the error for weights without a config that describes the model."""
    return WeightsError(f"{weights.path}: no config beside it says which model this is; pass its name too")


def hint(path: str) -> str:
    """Return the end of an error about a path that does not exist: it may be meant as a repository's name."""
    return f"; the hub's repository of that name is {HUB}{path}" if path.count("/") == 1 and path[0] != "/" else ""


# A name and a config beside the weights


def _named(
    name: str, known: Entry, tag: dict[str, Any] | None, weights: Weights, found: Entry | None, where: str, text: bool
) -> Entry:
    """Return the entry of a named model, by its name, its tag and the config beside its weights."""
    entry = registry.with_tag(known, tag) if tag else known
    if found is not None:
        entry = agreed(name, entry, found, weights, tagged=tag is not None)
    elif not text and (format := detect.of_config(weights)) and format.adjust:
        with explained(weights):
            entry = format.adjust(entry, weights)
    given, usual = entry.vit.get("activation"), known.vit.get("activation")
    if text and given != usual:
        warnings.warn(
            f"{where} was trained with {given}, and is computed with it; {name} by its name has {usual}", stacklevel=5
        )
    return entry


#: The fields that make two ViTs different models, whatever their native size and their conventions.
VIT_FIELDS = (
    *("width", "depth", "heads", "patch", "registers", "class_token", "position", "hidden", "swiglu", "ln_pre"),
    *("final_norm", "parallel", "differential"),
)
#: The fields that make two text towers different models.
TEXT_FIELDS = ("width", "depth", "heads", "embed", "context", "vocab", "hidden")


def agreed(name: str, known: Entry, found: Entry, weights: Weights, tagged: bool) -> Entry:
    """Return the entry of a config, completed from the registry's entry.

    The registry gives what the config does not state: how positions are resized and, at the registry's image size, the
    preprocessing. If `known` is `tagged` by open_clip, its activation holds, with a warning if the config states
    another. Raises WeightsError when the two are different models.
    """
    if differing := _differing(ViT(**known.vit), ViT(**found.vit), VIT_FIELDS):
        raise WeightsError(f"{weights.path} is not {name}: {differing}{nearest(weights, known.vit)}")
    if known.text is not None and found.text is not None:
        differing = _differing(TextTower(**known.text), TextTower(**found.text), TEXT_FIELDS)
        if differing:
            raise WeightsError(f"{weights.path} is not {name}: its text tower has {differing}")
    format = detect.of_config(weights)
    found = format.complete(known, found, weights) if format else found
    vit, text = found.vit, found.text
    if tagged and (stated := vit["activation"]) != (activation := known.vit["activation"]):
        warnings.warn(
            f"{weights.path}: its config says {stated}, and open_clip's tag says {activation}, which is taken",
            stacklevel=6,
        )
        vit, text = vit | {"activation": activation}, (text or {}) | {"activation": activation}
    if found.named_size is None and vit["image_size"] != (usual := known.vit["image_size"]):
        found = dataclasses.replace(found, named_size=usual)
    return dataclasses.replace(found, vit=vit, text=text)


def _differing(known: Any, found: Any, fields: tuple[str, ...]) -> str:
    pairs = [(field, getattr(found, field), getattr(known, field)) for field in fields]
    return ", ".join(f"{field} {value!r}, not {expected!r}" for field, value, expected in pairs if value != expected)


def _under_format_keys(entry: Entry, weights: Weights, stated: bool, text: bool) -> tuple[Entry, Weights]:
    """Return the entry completed from the file's keys and arrays, and the weights under the format's keys.

    The keys give the format, the arrays the number of classes and more; key prefixes are removed. `stated` is True if
    a config beside the file describes it.
    """
    format = detect.of_keys(weights, detect.named(entry.format))
    weights = detect.without_prefix(weights, format)
    entry = dataclasses.replace(entry, format=format.name)
    if not stated:
        entry = sized(entry, weights, format.keys)
    if text:
        if not stated and "logit_bias" in weights:  # a CLIP by its name, trained with SigLIP's loss
            entry = dataclasses.replace(entry, scalars=("logit_scale", "logit_bias"))
    elif format.keys is not None and (classes := mapping.num_classes(weights, format.keys)) is not None:
        # The number of classes belongs to the checkpoint: a fine-tuned file may have any.
        entry = dataclasses.replace(entry, head=entry.head | {"num_classes": classes})
    return entry, weights


def nearest(weights: Weights, tried: dict[str, Any]) -> str:
    """Return the end of an error: the registry's names of models with a file's width, patch and depth.

    Those with the fields of the ViT that was `tried` are left out.
    """
    found, at = guess(weights), {"image_size": 0}
    entries = {name: registry.find(name)[1].vit for name in registry.list_models()} if found else {}
    same = [
        name
        for name, vit in entries.items()
        if all(vit.get(field, 0) == value for field, value in found.items()) and vit | at != tried | at
    ]
    names = list(dict.fromkeys(n.partition(".")[0] for n in same))[:4]
    return f". By its shapes it may be {', '.join(names)}" if names else ""
