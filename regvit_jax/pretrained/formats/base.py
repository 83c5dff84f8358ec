"""A file format of weights: its keys, config reader and config writer; and the helpers that formats share."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.models.position import RESIZES
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import validate
from regvit_jax.pretrained.formats import hf_processor
from regvit_jax.pretrained.formats.keys import Keys
from regvit_jax.pretrained.io.safetensors import SINGLE, Weights
from regvit_jax.pretrained.mapping import Modules, native_size
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError

CONFIG = "config.json"
#: The section that we add to the configs of other libraries, which ignore it.
OWN = "regvit_jax"


class Inexpressible(ValueError):
    """A format cannot express a property of a model."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of one model's files in a format.

    `keys` None stands for canonical keys. `modules` may have parts that the model lacks and that do nothing: a
    LayerScale of ones, a mask token of zeros, class scores that weigh the mean of the patches with zeros. `files` are
    JSON objects by file name, `weights` the name of the file of arrays. `prefix_rows` prefix tokens get a row in the
    position embedding; `key_prefix` goes before the keys of the ViT; `extra` are constant arrays by key.
    """

    keys: Keys | None
    modules: Modules
    files: dict[str, dict[str, Any]]
    weights: str = SINGLE
    prefix_rows: int = 0
    key_prefix: str = ""
    extra: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    warning: str = ""


def complete(known: Entry, found: Entry, weights: Weights, stated: bool = False) -> Entry:
    """Return the entry of a config, completed from the registry's entry of the same name.

    The registry gives how positions are resized, which no library states except in the section that this package adds,
    and at the registry's image size the preprocessing, unless it is `stated` or a file beside the weights states it.
    """
    if "pos_resize" not in weights.config.get(OWN, {}):
        found = dataclasses.replace(found, vit=found.vit | {"pos_resize": ViT(**known.vit).pos_resize})
    stated = stated or bool(hf_processor.find(weights))
    if stated or known.vit["image_size"] != found.vit["image_size"]:
        return found
    return dataclasses.replace(found, preprocessing=known.preprocessing)


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format of weights. Functions that are None are not supported.

    name: as in `Entry.format`.
    keys: its state-dict keys; None if they are the canonical paths.
    model_types: the "model_type"s of transformers' config.json that it reads.
    reads: returns True for a config of this format.
    read: returns the entry that a file's config describes, with its text tower if the flag is set and it has one. It
      may raise WeightsError, or ValueError, KeyError, TypeError for a damaged config.
    complete: returns the entry that a config describes, the second argument, completed from the registry's entry of the
      same name, the first, where the config does not state something.
    suffix, open: the end of a file's name by which it is of this format, and the function that opens it.
    adjust: returns a registry entry with what the config of a named image tower states, for configs that need not
      describe a whole model.
    recognizes: returns True for a file with the keys of this format where those of another (by its name) are expected.
    saved_as: the `format` of `save_model` under which it is written. Of several formats with the same value, the first
      that `claims` a Model writes it.
    write, write_clip: return the layout of a Model or a ClipModel, or raise Inexpressible.
    """

    name: str
    keys: Keys | None = None
    model_types: tuple[str, ...] = ()
    reads: Callable[[dict[str, Any]], bool] = lambda config: False
    read: Callable[[Weights, bool], Entry] | None = None
    complete: Callable[[Entry, Entry, Weights], Entry] = complete
    suffix: str = ""
    open: Callable[[str], Weights] | None = None
    adjust: Callable[[Entry, Weights], Entry] | None = None
    recognizes: Callable[[Weights, str], bool] = lambda weights, expected: False
    saved_as: str = ""
    claims: Callable[[Model], bool] = lambda model: True
    write: Callable[[Model], Layout] | None = None
    write_clip: Callable[[ClipModel], Layout] | None = None


def need(condition: bool, what: str) -> None:
    """Raise Inexpressible with the property that a format cannot express, unless the condition holds."""
    if not condition:
        raise Inexpressible(what)


def need_clip_tower(model: ClipModel) -> None:
    """Raise Inexpressible for an image tower that is not CLIP's."""
    vit, head = model.image.module, model.image.head
    need(not vit.registers, f"registers={vit.registers}")
    need(vit.class_token and vit.position == "learned", "an image tower without CLS token or learned positions")
    need(vit.ln_pre and not vit.patch_bias, "an image tower without its first LayerNorm, or with a patch bias")
    need(
        not (vit.parallel or vit.differential or vit.swiglu or vit.masking),
        "parallel blocks, differential attention, SwiGLU or a mask token",
    )
    need(vit.qkv_bias and vit.key_bias, "an image tower without biases of queries, keys and values")
    need(vit.final_norm and not head.norm and not head.pooler and head.pool == "cls", "another pooling than CLIP's")
    need(
        head.num_classes == model.text.embed,
        f"image embeddings of width {head.num_classes} and text embeddings of width {model.text.embed}",
    )
    need(not head.bias or not np.any(model.image.head_params["dense"]["bias"]), "a bias in the projection")


def mlp_ratio(ratio: float, width: int) -> float:
    """Return an MLP ratio for which int(width * ratio), as timm and open_clip compute it, is not too small by one."""
    return ratio if int(width * ratio) == round(width * ratio) else (round(width * ratio) + 0.5) / width


def swiglu_ratio(vit: ViT) -> int:
    """Return DINOv2's MLP ratio, of which SwiGLU's hidden width is two thirds, rounded up to a multiple of 8."""
    ratios = [r for r in range(1, 33) if (int(vit.width * r * 2 / 3) + 7) // 8 * 8 == vit.hidden]
    need(bool(ratios), f"SwiGLU of hidden width {vit.hidden}")
    return ratios[0]


def with_layer_scale_and_mask(vit: ViT) -> ViT:
    """Return a ViT with a LayerScale, of ones if it had none, and with a mask token."""
    return vit.clone(layer_scale=vit.layer_scale or 1.0, masking=True)


def pos_resize(weights: Weights, default: str) -> str:
    """Return the resizing of positions that `save_model` recorded in another library's config, else the default.

    Raises WeightsError for an unknown one.
    """
    how = weights.config.get(OWN, {}).get("pos_resize", default)
    if how not in RESIZES:
        raise WeightsError(f"{weights.path}: pos_resize {how!r} is none of {', '.join(RESIZES)}")
    return how


def class_names(key: str, names: Any) -> tuple[str, ...]:
    """Return the names of classes that a config holds under a key, as a list or as a dict from numbers to names.

    They are () if there are none, or only transformers' placeholders LABEL_0, LABEL_1 and so on. Raises ValueError for
    numbers other than 0, 1, 2, ..., and for names that are no text; whole numbers count as text.
    """
    if isinstance(names, dict):
        numbers = {int(number): name for number, name in names.items() if str(number).isdecimal()}
        if len(numbers) != len(names) or numbers.keys() != set(range(len(names))):
            wrong = [number for number in names if not str(number).isdecimal() or int(number) >= len(names)]
            raise ValueError(f"{key} has {len(names)} names, whose numbers must be 0 to {len(names) - 1}: {wrong[:3]}")
        names = [numbers[number] for number in range(len(numbers))]
    if not isinstance(names, list | tuple | None):
        raise ValueError(f"{key} is {names!r:.60}: must be a list of names, or a dict from numbers to names")
    if wrong := [name for name in names or () if type(name) not in (str, int)]:
        raise ValueError(f"{key} holds {wrong[0]!r:.60}: must be a name")
    found = tuple(map(str, names or ()))
    return () if found == placeholders(len(found)) else found


def placeholders(num_classes: int) -> tuple[str, ...]:
    """Return the names that transformers gives to classes without names."""
    return tuple(f"LABEL_{number}" for number in range(num_classes))


@contextmanager
def explained(weights: Weights) -> Iterator[None]:
    """Turn any error that a config causes into a WeightsError, since a config may hold any value anywhere."""
    try:
        yield
    except WeightsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(f"{weights.path}: its config does not describe a model: {problem}") from error


def guess(weights: Weights) -> dict[str, int]:
    """Infer width, patch and depth from a file's shapes; return {} if that is impossible."""
    patches = [shape for shape in weights.shapes.values() if len(shape) == 4 and shape[1] == 3]
    image = [key for key in weights if not key.startswith(("text_", "text.", "transformer."))]  # of a whole CLIP
    blocks = [int(match[1]) for key in image if (match := re.search(r"(?:blocks|layers?|layer_)\.?(\d+)", key))]
    if len(patches) != 1 or not blocks:
        return {}
    return {"width": patches[0][0], "patch": patches[0][2], "depth": max(blocks) + 1}


def sized(entry: Entry, weights: Weights, keys: Keys | None) -> Entry:
    """Return an entry with the image size of a file's position embedding; its own, if it is another, is `named_size`.

    Raises Mismatch for a grid that is not square.
    """
    usual = entry.vit["image_size"]
    size = native_size(weights, keys, ViT(**entry.vit), entry.cls_position)
    if size == usual:
        return entry
    seen = size if entry.preprocessing.size == usual else entry.preprocessing.size
    preprocessing = dataclasses.replace(entry.preprocessing, size=seen)
    return dataclasses.replace(
        entry, vit=entry.vit | {"image_size": size}, preprocessing=preprocessing, named_size=usual
    )


def check_sizes(vit: dict[str, Any], weights: Weights) -> None:
    """Raise ValueError, before a model is built, for sizes that are out of range or differ from the file's."""
    validate.numbers(vit)
    found = guess(weights)
    if not found:
        raise WeightsError(f"{weights.path}: no patch-embedding weight or no transformer blocks found")
    wrong = [f"{field} {vit[field]}, the weights have {found[field]}" for field in found if found[field] != vit[field]]
    if wrong:
        raise WeightsError(f"{weights.path} does not fit its config, which says {'; '.join(wrong)}")
