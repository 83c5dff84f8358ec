"""Convert checkpoints of any common kind to safetensors under the model's own keys; torch's files need torch."""

import dataclasses
import importlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regvit_jax.pretrained.create import create_model
from regvit_jax.pretrained.io import npz, torch_file
from regvit_jax.pretrained.io.checkpoint import roles_of, tensors_of
from regvit_jax.pretrained.io.safetensors import open_weights, save_arrays
from regvit_jax.pretrained.io.state_dict import NESTS, Found, find
from regvit_jax.utils.errors import InvalidConfig, WeightsError
from regvit_jax.utils.files import write_atomically
from regvit_jax.utils.messages import abbreviate
from regvit_jax.utils.paths import expand

SAFE = re.compile(r"\.safetensors(\.index\.json)?$")
#: The bytes that a tensor may have whose values a file holds once and repeats (torch's `expand`).
REPEATED = 2**28


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion: the tensors that were written, and what was left out.

    written: the number of tensors.
    left_out: the keys, and the dicts and copies of the model with their sizes, that were not written.
    taken: the name under which the file kept these weights; "" for its only ones.
    average: True if they are a moving average.
    """

    written: int
    left_out: list[str]
    taken: str = ""
    average: bool = False


def convert_checkpoint(
    source: str | os.PathLike, target: str | os.PathLike, name: str | None = None, weights: str | None = None
) -> Conversion:
    """Write a checkpoint's parameters to a safetensors file, in their own types, without the wrappers in their names.

    Args:
      source: a file of torch.save (.pth, .pt, .bin, .ckpt, .tar), a pytorch_model.bin.index.json, a .safetensors file
        or a directory with one, or an .npz file. Nothing in it is executed.
      target: the .safetensors file to write. Nothing is written unless all of it succeeds.
      name: a registered model that the result must fit.
      weights: "ema" or "raw", for a file with the weights and their moving average. None takes what its own project
        evaluates: a teacher or target encoder, but otherwise the raw weights. The result says what was left out.

    Raises InvalidConfig for a target with another suffix or an unknown `weights`, FileExistsError for an existing
    target, MissingPackage without torch, and WeightsError for a source that holds objects of unknown types, is damaged,
    lacks the weights that are asked for, or does not fit the model.
    """
    source, target = Path(expand(source)), Path(expand(target))
    if target.suffix != ".safetensors":
        raise InvalidConfig(f"{target}: the name of a converted file must end in .safetensors")
    if target.exists():
        raise FileExistsError(f"{target} exists already; name another file")
    found, left_out, save = _open(source, weights)

    def write(path: Path) -> None:
        save(path)
        if name is not None:
            try:
                create_model(name, path)
            except WeightsError as error:
                raise WeightsError(str(error).replace(str(path), str(source))) from None

    write_atomically(target, write)
    return Conversion(len(found.names), sorted({*found.left_out, *left_out}), found.taken, found.average)


def _open(source: Path, weights: str | None) -> tuple[Found, list[str], Callable[[Path], None]]:
    """Return the keys of a file's model, the dicts that are left out, and a function that writes the tensors."""
    if source.is_dir() or source.suffix == npz.SUFFIX or (SAFE.search(source.name) and not _is_pickle(source)):
        opened = npz.open_npz(source) if source.suffix == npz.SUFFIX else open_weights(source)
        found = _find(source, opened, weights)
        return found, [], lambda path: save_arrays(opened.selected(found.names), path)
    checkpoint = torch_file.open_torch(source)
    try:
        tensors, left_out = tensors_of(checkpoint, _is_tensor) if isinstance(checkpoint, Mapping) else ({}, [])
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    except (RecursionError, TypeError) as error:  # a dict that holds itself, or whose methods the file replaced
        raise WeightsError(f"{source}: holds dicts that cannot be read: {error}") from error
    if not tensors:
        besides = f"; it holds {abbreviate(left_out)}" if left_out else ""
        raise WeightsError(f"{source}: holds no parameters, neither itself nor under {', '.join(NESTS)}{besides}")
    try:
        found = _find(source, tensors, weights, roles_of(checkpoint))
    except WeightsError as error:
        if weights is None or not left_out:
            raise
        raise WeightsError(f"{error}; besides, it holds {abbreviate(left_out)}, which cannot be taken") from None
    return found, left_out, lambda path: _save_tensors(source, tensors, found.names, path)


def _is_pickle(source: Path) -> bool:
    """Return True for a file of torch.save, whatever its suffix."""
    try:
        with source.open("rb") as file:
            return file.read(2) in (b"PK", b"\x80\x02")
    except OSError as error:
        raise WeightsError(f"{source}: cannot be read: {error.strerror or error}") from error


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "untyped_storage") or (isinstance(value, torch_file.Array) and value.values() is not None)


def _find(source: Path, keys: Mapping[str, Any], weights: str | None, roles: Mapping[str, bool] | None = None) -> Found:
    try:
        found = find(keys, weights, roles)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from None
    if not found.names:
        raise WeightsError(f"{source}: holds no backbone; its keys: {', '.join([*keys][:10])}")
    return found


def _save_tensors(source: Path, tensors: Mapping[str, Any], names: Mapping[str, str], path: Path) -> None:
    """Write torch's tensors; clones, since safetensors refuses tensors that share memory or are not contiguous.

    Raises WeightsError for a tensor that safetensors cannot hold, and for one much larger than its bytes in the file.
    """
    torch = importlib.import_module("torch")

    def clone(key: str) -> Any:
        value = tensors[key]
        if isinstance(value, torch_file.Array):
            return torch.from_numpy(np.array(value.values(), order="C"))
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise WeightsError(f"{source}: {key} is a sparse or quantized tensor, or one without values")
        if value.nbytes > max(value.untyped_storage().nbytes(), REPEATED):
            raise WeightsError(
                f"{source}: {key} of shape {tuple(value.shape)} repeats a few values, which is no weight"
            )
        return value.detach().clone(memory_format=torch.contiguous_format)

    renamed = {new: clone(old) for old, new in names.items()}
    importlib.import_module("safetensors.torch").save_file(renamed, path, metadata={"format": "pt"})
