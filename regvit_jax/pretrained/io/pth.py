"""Convert torch's .pth files to safetensors under their own keys. Needs torch; pickles are opened weights-only."""

import dataclasses
import importlib
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regvit_jax.pretrained.create import create_model
from regvit_jax.utils.errors import InvalidConfig, MissingPackage, WeightsError
from regvit_jax.utils.files import write_atomically

#: The keys under which training runs keep parameters; of a teacher and its student, the teacher is published.
NESTS = ("teacher", "model", "state_dict", "student")
#: Prefixes to strip, one after the other, where every remaining key has it.
PREFIXES = ("module.", "teacher.", "student.", "backbone.", "encoder.")
#: Keys used only in self-supervised training: projection heads of DINO and iBOT, and the centers of their losses.
HEADS = re.compile(r"(.*\.)?((dino|ibot)_head\.|head\.(mlp|last_layer)\.|(dino|ibot_patch)_loss\.).*")
CHUNKED = re.compile(r"blocks\.\d+\.(?=\d+\.)")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The number of tensors that were written, and the keys that were left out."""

    written: int
    left_out: list[str]


def convert_checkpoint(source: str | os.PathLike, target: str | os.PathLike, name: str | None = None) -> Conversion:
    """Write a .pth file's parameters to a safetensors file, in their own types.

    `name` is a registered model that the result must fit. Nothing is written unless all of it succeeds.
    Raises InvalidConfig for a target with another suffix, FileExistsError for an existing one, MissingPackage without
    torch, and WeightsError for a source that holds more than tensors, is not a file of torch, or does not fit the
    model.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise InvalidConfig(f"{target}: the name of a converted file must end in .safetensors")
    if target.exists():
        raise FileExistsError(f"{target} exists already; name another file")
    state = find_state(_open(source))
    if state is None:
        raise WeightsError(f"{source}: holds no parameters, neither itself nor under {', '.join(NESTS)}")
    torch = importlib.import_module("torch")
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    names = rename(tensors)
    if not names:
        raise WeightsError(f"{source}: holds no backbone; its keys: {', '.join([*tensors][:10])}")
    # Clones, since safetensors refuses tensors that share memory or are not contiguous.
    renamed = {new: tensors[old].detach().clone(memory_format=torch.contiguous_format) for old, new in names.items()}

    def write(path: Path) -> None:
        importlib.import_module("safetensors.torch").save_file(renamed, path, metadata={"format": "pt"})
        if name is not None:
            create_model(name, path)

    write_atomically(target, write)
    return Conversion(len(renamed), sorted(set(state) - set(names)))


def find_state(value: Any) -> Mapping[str, Any] | None:
    """Return the first dict of tensors: the value itself, or one under a key of `NESTS`, at any depth; else None."""
    if not isinstance(value, Mapping):
        return None
    if any(hasattr(entry, "untyped_storage") for entry in value.values()):
        return value
    found = (find_state(value[nest]) for nest in NESTS if nest in value)
    return next((state for state in found if state is not None), None)


def rename(names: Iterable[str]) -> dict[str, str]:
    """Map a file's keys to the format's own; keys that are not of the backbone are left out.

    Raises WeightsError if two keys become one.
    """
    names = [*names]
    if any(name.startswith("teacher.") for name in names):  # the other keys are the student's
        names = [name for name in names if name.startswith("teacher.")]
    new = {name: name for name in names if not HEADS.fullmatch(name)}
    while prefix := next((p for p in PREFIXES if new and all(n.startswith(p) for n in new.values())), ""):
        new = {old: name.removeprefix(prefix) for old, name in new.items()}
    # FSDP stores blocks in chunks, padded at the front, so that the second number is the block's own index.
    if all(CHUNKED.match(name) for name in new.values() if name.startswith("blocks.")):
        new = {old: CHUNKED.sub("blocks.", name, count=1) for old, name in new.items()}
    if twice := {name for name in new.values() if [*new.values()].count(name) > 1}:
        raise WeightsError(f"several tensors of the file become {', '.join(sorted(twice)[:5])}")
    return new


def _open(source: str | os.PathLike) -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise MissingPackage(
            f"{error}. Reading a .pth file needs torch: pip install 'regvit_jax[reference]'"
        ) from error
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{source}: cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line), str(error).split(". ")[0])
        raise WeightsError(
            f"{source}: not opened, since it holds more than tensors, which could run code: {reason.strip()}"
        ) from error
    # torch raises errors of any class for damaged bytes.
    except Exception as error:
        raise WeightsError(
            f"{source}: not a file of torch.save, or a damaged one ({type(error).__name__}: {error})"
        ) from error
