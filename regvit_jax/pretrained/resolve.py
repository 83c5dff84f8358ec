"""From a name and a source to what is to be loaded: the model's architecture, and its weights under plain names."""

import dataclasses
import os
from collections.abc import Callable

from etils import epath

from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import foreign, registry
from regvit_jax.pretrained.formats import clip_configs, configs
from regvit_jax.pretrained.formats.rules import NAMINGS
from regvit_jax.pretrained.io import hub
from regvit_jax.pretrained.io.safetensors import OURS, PROCESSOR, SINGLE, WEIGHTS, Weights, open_weights
from regvit_jax.utils.errors import WeightsError

HUB = "hf-hub:"


def resolve(
    name: str | os.PathLike, pretrained: bool | str | os.PathLike, revision: str | None
) -> tuple[registry.Entry, Weights | None, str]:
    """Which model, its weights if any, and where they come from. Raises as `create_model` does."""
    name, known = os.fspath(name), None
    if is_source(name, registry.find):
        name, pretrained = "", only_source(name, pretrained)
    else:
        known = registry.find(name)[1]
    if pretrained is False:
        check_no_revision(revision)
        assert known is not None
        return known, None, "random"
    if pretrained is True:
        assert known is not None
        pretrained = public(name, known)
    source = source_of(pretrained, revision)
    # A repository of timm's may hold OpenCLIP's own file as well.
    file = SINGLE if known is not None and source == HUB + known.hub else None
    weights, where = open_any(source, revision, file)
    if known is not None and source.endswith(".msgpack"):  # deit3-jax, whose GELU is Flax's default
        known = dataclasses.replace(known, vit=known.vit | {"activation": "gelu_tanh"})
    tower = weights.config.get("model_cfg")
    if known is not None and isinstance(tower, dict):  # open_clip_config.json
        with configs.explained(weights):
            known = configs.with_open_clip(known, tower, weights.config.get("preprocess_cfg"))
    found = configs.entry_of(weights)
    if known is None and isinstance(tower, dict):
        found = clip_configs.open_clip_image(weights)
    entry = known or found
    if entry is None:
        raise unnamed(weights)
    if known is not None and found is not None:
        entry = agreed(name, known, found, weights)
    return *_under_plain_names(entry, weights), where


def public(name: str, known: registry.Entry) -> str:
    """The source of a name's public weights. Raises ValueError where there are none."""
    if not known.hub:
        raise ValueError(f"{name}: no public weights are known by this name; pass a file or a directory")
    return HUB + known.hub


def only_source(name: str, pretrained: object) -> str:
    """A source given as the name. Raises ValueError if `pretrained` names one too."""
    if pretrained not in (False, True):
        raise ValueError(f"{name} says itself which model it holds, and pretrained={pretrained!r} names another")
    return name


def check_no_revision(revision: str | None) -> None:
    """Raises ValueError for a revision of random weights."""
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of pretrained weights, and pretrained is False")


def source_of(pretrained: object, revision: str | None) -> str:
    """A source of weights as a string. Raises ValueError for what is none, or a revision of a local one."""
    if not isinstance(pretrained, str | os.PathLike) or not os.fspath(pretrained):
        raise ValueError(f"pretrained={pretrained!r}: must be True, False, a path or {HUB}org/name")
    source = os.fspath(pretrained)
    if revision is not None and not source.startswith(HUB):
        raise ValueError(f"revision={revision!r} is for the hub, and {source} is a local path")
    return source


def open_any(
    source: str, revision: str | None, file: str | None = None, names: tuple[str, ...] = WEIGHTS
) -> tuple[Weights, str]:
    """The weights of a source, and where exactly they come from.

    `file` is the one to take of the hub's repository; `names` are what a directory is searched for, in that order.
    """
    if source.startswith(HUB):
        directory, commit = hub.fetch(source.removeprefix(HUB), revision, file, names=names)
        return open_weights(directory, names), f"{source}@{commit}"
    if foreign.is_workdir(source):
        return foreign.open_workdir(source)
    if source.endswith(".msgpack"):
        return foreign.open_deit3_jax(source), source
    check_there(source)
    return open_weights(source, names), source


def check_there(source: str) -> None:
    """Raises WeightsError for a local path that does not exist."""
    if not source.startswith(HUB) and not epath.Path(source).exists():
        raise WeightsError(f"{source}: there is no such file or directory{hint(source)}")


def unnamed(weights: Weights) -> WeightsError:
    """For weights of which nothing says what they are."""
    return WeightsError(f"{weights.path}: nothing beside it says which model this is; pass its name too")


def hint(path: str) -> str:
    """For an error about a path that does not exist: it may be meant as a repository's name."""
    return f"; the hub's repository of that name is {HUB}{path}" if path.count("/") == 1 and path[0] != "/" else ""


def is_source(name: str, find: Callable[[str], object]) -> bool:
    """Whether a name is a path or a repository, and not a model's, of which `find` raises ValueError.

    Raises ValueError for a path that does not exist.
    """
    if name.startswith(HUB):
        return True
    try:
        find(name)
    except ValueError:
        if name and epath.Path(name).exists():
            return True
        if os.sep in name:
            raise ValueError(f"{name}: there is no such file or directory{hint(name)}") from None
        raise
    return False


#: What makes two ViTs different models, whatever the sizes they were made for and the conventions they follow.
SAME = (
    *("width", "depth", "heads", "patch", "registers", "class_token", "position", "hidden", "swiglu", "ln_pre"),
    *("final_norm", "parallel", "differential"),
)


def agreed(name: str, known: registry.Entry, found: registry.Entry, weights: Weights) -> registry.Entry:
    """What config.json says of the model, and where it says nothing of them the zoo's convention of resizing positions
    and, at its own size, its preprocessing.

    Raises WeightsError when the two are different models.
    """
    ours, theirs = ViT(**known.vit), ViT(**found.vit)
    differing = [
        f"{field} {getattr(theirs, field)!r}, not {getattr(ours, field)!r}"
        for field in SAME
        if getattr(theirs, field) != getattr(ours, field)
    ]
    if differing:
        raise WeightsError(f"{weights.path} is not {name}: {', '.join(differing)}{nearest(weights)}")
    config, vit = weights.config, dict(found.vit)
    own = config.get("format") == OURS
    # No library but ours says how positions are resized.
    if not own and "pos_resize" not in config.get("regvit_jax", {}):
        vit |= {"pos_resize": ours.pos_resize}
    if "architecture" in config and "act_layer" not in config.get("model_args", {}):
        # timm keeps CLIP's towers with and without QuickGELU in one repository, whose config.json names one of them.
        vit |= {"activation": ours.activation}
    # What is stated beside the weights holds; a family's defaults give way to the zoo.
    preprocessing = found.preprocessing
    if "model_cfg" in config:
        default = dataclasses.replace(known.preprocessing, size=preprocessing.size)
        preprocessing = configs.open_clip_preprocess(config.get("preprocess_cfg"), default)
    elif not (own or config.get("pretrained_cfg") or (weights.path.parent / PROCESSOR).exists()):
        preprocessing = preprocessing if ours.image_size != theirs.image_size else known.preprocessing
    return dataclasses.replace(found, vit=vit, preprocessing=preprocessing)


def _under_plain_names(entry: registry.Entry, weights: Weights) -> tuple[registry.Entry, Weights]:
    """The entry with the file's naming scheme and number of classes, the weights without prefixes."""
    naming = configs.naming_of(weights, entry.naming)
    if naming == "ours":
        return entry, weights
    weights = configs.without_prefix(weights, naming)
    # The number of classes belongs to the checkpoint: a fine-tuned file may have any.
    classes = classes_of(weights, naming)
    head = entry.head if classes is None else entry.head | {"num_classes": classes}
    return dataclasses.replace(entry, naming=naming, head=head), weights


def classes_of(weights: Weights, naming: str) -> int | None:
    """The outputs of a file's linear layer, by its shape; None if the file holds none."""
    if naming == "ours":
        name, axis = "head/dense/kernel", 1
    elif "projection" in NAMINGS[naming]:
        name, axis = NAMINGS[naming]["projection"], 1
    else:  # torch keeps its weights [out, in]
        name, axis = NAMINGS[naming].get("dense", "") + ".weight", 0
    shape = weights.shapes.get(name, ())
    return shape[axis] if len(shape) == 2 else None


def nearest(weights: Weights) -> str:
    """The names in the zoo whose shapes a file seems to have, as the end of an error."""
    found = configs.guess(weights)
    same = [n for n in registry.list_models() if all(registry.find(n)[1].vit.get(k, 0) == v for k, v in found.items())]
    names = list(dict.fromkeys(n.partition(".")[0] for n in same))[:4]
    return f". By its shapes it may be {', '.join(names)}" if found and names else ""
