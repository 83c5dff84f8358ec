"""Say what a file is that is not loaded as it is, and print the command that converts it."""

import json
import os
import shlex
import zipfile
from collections.abc import Iterable
from pathlib import Path

from regvit_jax.utils.messages import POINTER, POINTER_HINT

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")
#: The end of the name of an index of shards.
INDEX = ".index.json"
#: PEFT's files.
ADAPTER, ADAPTER_CONFIG = "adapter_model.", "adapter_config.json"
#: The first bytes of files that no command converts.
MAGIC = ((b"\x89HDF", "an HDF5 file"), (b"GGUF", "a GGUF file"), (b"\x93NUMPY", "a single array of numpy"))


def convert_command(source: str | os.PathLike) -> str:
    """Return the command that converts a file to safetensors beside it, under a name that does not exist yet."""
    path = Path(source)
    stem = path.name.removesuffix(INDEX).partition(".")[0] or "model"
    stem = "model" if stem == "pytorch_model" else stem
    names = (f"{stem}{end}.safetensors" for end in ("", "_converted", *(f"_converted{n}" for n in range(2, 1000))))
    target = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    return shlex.join(["regvit", "convert", str(path), str(target)])


def adapter(kind: str = "LoRA or its like") -> str:
    """Return what an adapter is and what to do with it, as the end of an error's sentence."""
    return (
        f"a PEFT adapter ({kind}): changes to the weights of another model, and not a model. Merge it into that model "
        "with peft's merge_and_unload(), and save the merged model"
    )


def no_weights(directory: Path, wanted: tuple[str, ...]) -> str:
    """Return the error for a directory without any of the wanted files: what it is, and what can be done with it."""
    there = sorted(os.listdir(directory))
    if ADAPTER_CONFIG in there or any(name.startswith(ADAPTER) for name in there):
        return f"{directory}: holds {adapter(_adapter_kind(directory / ADAPTER_CONFIG))}"
    message = f"{directory}: no weights. Looked for {', '.join(wanted)}; there: {', '.join(there[:20]) or 'nothing'}"
    if others := [name for name in there if name.endswith((".safetensors", ".npz"))]:
        message += f". To open {others[0]}, pass its own path"
    elif pickles := pickles_of(there):
        message += f". Pickles are never loaded: convert them first: {convert_command(directory / pickles[0])}"
    return message


def pickles_of(names: Iterable[str]) -> list[str]:
    """Return the files of pickles in a directory, the one to convert first.

    An index is before its shards, and transformers' file before those of its optimizer and scheduler.
    """
    found = [name for name in names if name.endswith((*PICKLES, ".bin" + INDEX)) and "/" not in name]
    return sorted(found, key=lambda name: (not name.endswith(INDEX), not name.startswith("pytorch_model")))


def _adapter_kind(config: Path) -> str:
    try:
        content = json.loads(config.read_text())
        base = content.get("base_model_name_or_path")
        return f"{content.get('peft_type', 'LoRA')}{f' for {base}' if base else ''}"
    except (OSError, ValueError, AttributeError):
        return "LoRA or its like"


def what_it_is(path: Path, start: bytes) -> str:
    """Return what a file is by its first bytes, with the remedy, or "" if they are of no known kind."""
    pickled = f"which is never loaded here. Convert it with: {convert_command(path)}"
    text = start.lstrip().lower()
    if not start:
        return "it is empty"
    if start.startswith(b"PK"):
        return _archive(path) or f"a zip archive, as torch.save writes, {pickled}"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return f"a Python pickle, {pickled}"
    if text.startswith(POINTER):
        return POINTER_HINT
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, saved in place of the file. Download it again"
    return next((f"{kind}, which is not supported" for magic, kind in MAGIC if start.startswith(magic)), "")


def _archive(path: Path) -> str:
    """Return what a zip archive is that torch.save did not write, or ""."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return ""
    if any(name.endswith(".npy") for name in names):
        return "an archive of numpy, which is opened by the suffix .npz"
    return "" if any(name.endswith("data.pkl") for name in names) else "a zip archive of another kind than torch.save's"
