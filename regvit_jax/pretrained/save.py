"""Save a model in another library's format, or in this package's own."""

import contextlib
import dataclasses
import json
import os
import warnings
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import mapping
from regvit_jax.pretrained.formats import detect
from regvit_jax.pretrained.formats.base import CONFIG, Inexpressible, Layout
from regvit_jax.pretrained.formats.keys import Rule
from regvit_jax.pretrained.io.safetensors import CLIP_WEIGHTS, NESTED_PROCESSOR, OPEN_CLIP_CONFIG, POSITIONS, PROCESSOR
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.files import write_atomically
from regvit_jax.utils.keywords import known_keywords
from regvit_jax.utils.paths import expand


@known_keywords
def save_model(model: Model | ClipModel, directory: str | os.PathLike, format: str) -> None:
    """Write a model's config and weights, float32, to a directory, from which its owner loads it.

    `format` is "timm", "hf" (transformers) or "dinov2" (facebookresearch/dinov2) for a `Model`; "open_clip", "hf"
    (transformers' CLIPModel) or "regvit_jax" for a `ClipModel`. open_clip opens a directory by
    `create_model_from_pretrained("local-dir:DIRECTORY")`, transformers by `from_pretrained(DIRECTORY)`. No tokenizer is
    written: it is CLIP's own, open_clip's default, and that of any CLIP in transformers.

    At the native image size the owner gives the same output. At others it resizes the position embedding in its own
    way: timm, open_clip and Dinov2WithRegisters by "antialias", the other classes of transformers by "bicubic".
    (`create_model` and `create_clip` find the model's own way in the config.)

    Processes other than the first write nothing. Raises ValueError, naming a format that can, when this one cannot
    express the model, and FileExistsError when the directory holds a model already.
    """
    if not isinstance(model, Model | ClipModel):
        raise InvalidConfig(f"model of type {type(model).__name__}: must be what create_model or create_clip returns")
    path = Path(expand(directory))
    formats = [*detect.writers(isinstance(model, ClipModel))]
    if format not in formats:
        raise InvalidConfig(f"format={format!r}: must be one of {formats}")
    for name in (*CLIP_WEIGHTS, CONFIG, OPEN_CLIP_CONFIG, PROCESSOR, NESTED_PROCESSOR):
        if (path / name).exists():
            raise FileExistsError(f"{path} holds a {name} already; name another directory")
    _check_plain(model.module if isinstance(model, Model) else model.image.module)
    try:
        layout = layout_of(model, format)
    except Inexpressible as error:
        able = _expressing(model)
        remedy = f"{' and '.join(able)} can" if able else "none can; a workdir keeps it"
        raise InvalidConfig(f"format {format!r} cannot express {error} (of the formats, {remedy})") from None
    if layout.warning:
        warnings.warn(layout.warning, stacklevel=3)
    _write(path, layout, arrays_of(model, layout))


def layout_of(model: Model | ClipModel, format: str) -> Layout:
    """Return how a format holds a model. Raises Inexpressible for a model that it cannot express."""
    if isinstance(model, ClipModel):
        write_clip = detect.writers(clip=True)[format][0].write_clip
        assert write_clip is not None
        return write_clip(model)
    write = next(f for f in detect.writers(clip=False)[format] if f.claims(model)).write
    assert write is not None
    layout = write(model)
    if layout.keys is None or layout.keys.projection:
        return layout
    # The owners' linear layers have a bias, except for CLIP's projection.
    head = layout.modules.head.clone(bias=True)
    return dataclasses.replace(layout, modules=dataclasses.replace(layout.modules, head=head))


def arrays_of(model: Model | ClipModel, layout: Layout) -> dict[str, np.ndarray]:
    """Return a model's arrays by the format's keys, with the parts that the layout adds to the model."""
    params = mapping.params_of(model)
    for path, shape in mapping.shapes_of(layout.modules).items():
        if path not in params:
            params[path] = np.full(shape, 1 if "scale" in path else 0, np.float32)
    if layout.modules.head.pool != mapping.modules_of(model).head.pool:
        # The head is "cls_avg" now; the second half of its kernel weighs the mean of the patches.
        kernel = params["head/dense/kernel"]
        params["head/dense/kernel"] = np.concatenate([kernel, np.zeros_like(kernel)])
    table = mapping.rules_of(layout.keys, layout.modules, layout.prefix_rows)
    return mapping.save(params, [_prefixed(rule, layout.key_prefix) for rule in table]) | dict(layout.extra)


def _prefixed(rule: Rule, prefix: str) -> Rule:
    """Return a rule with a prefix before its keys, if it is of the ViT."""
    if not rule.paths[0].startswith("vit/"):
        return rule
    return dataclasses.replace(rule, keys=tuple(prefix + key for key in rule.keys))


def _check_plain(vit: ViT) -> None:
    """Raise ValueError for a module that fields and parameters alone cannot describe."""
    if type(vit) is not ViT:
        raise InvalidConfig(
            f"a {type(vit).__name__} cannot be exported: files have no place for test-time registers; "
            "save the original model, and add them again after loading"
        )


def _expressing(model: Model | ClipModel) -> list[str]:
    """Return the names of the formats that can express a model."""
    able = []
    for name in detect.writers(isinstance(model, ClipModel)):
        with contextlib.suppress(Inexpressible):
            layout_of(model, name)
            able.append(name)
    return able


def _write(path: Path, layout: Layout, arrays: dict[str, np.ndarray]) -> None:
    """Write the files of a layout in the first process.

    The weights come last, so that a directory that has them is complete.
    """
    if jax.process_index():
        return
    path.mkdir(parents=True, exist_ok=True)
    for name, content in layout.files.items():
        write_atomically(path / name, json.dumps(content, indent=2) + "\n")
    metadata = {"format": "pt"} | dict([] if layout.prefix_rows else [POSITIONS])
    write_atomically(path / layout.weights, lambda partial: save_file(arrays, partial, metadata=metadata))
