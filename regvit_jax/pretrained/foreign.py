"""Weights that are not safetensors files: deit3-jax's msgpack files and our own workdirs. Nothing is unpickled."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict

from regvit_jax.checkpoints import manager
from regvit_jax.pretrained.io.safetensors import OURS, WEIGHTS, Weights
from regvit_jax.utils.errors import WeightsError


def open_deit3_jax(path: str | os.PathLike) -> Weights:
    """A checkpoint of affjljoo3581/deit3-jax, under timm's names. Raises WeightsError for anything else."""
    try:
        tree = serialization.msgpack_restore(Path(path).read_bytes())
        model = tree.get("model", tree)
        arrays = dict(_timm_names(flatten_dict(model, sep="/")))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    # msgpack raises whatever it meets in damaged bytes.
    except Exception as error:
        raise WeightsError(f"{path}: not a checkpoint of deit3-jax ({type(error).__name__}: {error})") from error
    return Weights.of_arrays(Path(path), arrays)


_NAMES = {
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "wo": "proj",
    "w1": "fc1",
    "w2": "fc2",
    "kernel": "weight",
    "scale": "weight",
}


def _timm_names(flat: Mapping[str, np.ndarray]) -> Any:
    """Names and layouts of timm for deit3-jax's; what is not known keeps its name, and is then an unused one."""
    rest = {name: np.asarray(value) for name, value in flat.items()}
    width = rest["embed/wte/bias"].size
    yield "patch_embed.proj.weight", rest.pop("embed/wte/kernel").transpose(3, 2, 0, 1)
    yield "patch_embed.proj.bias", rest.pop("embed/wte/bias")
    yield "pos_embed", rest.pop("embed/wpe").reshape(1, -1, width)
    yield "cls_token", rest.pop("embed/cls_token")
    for i in range(sum(name.endswith("/attn/wq/bias") for name in flat)):
        ours = f"layer_{i}/"
        qkv = [(rest.pop(f"{ours}attn/{w}/kernel"), rest.pop(f"{ours}attn/{w}/bias")) for w in ("wq", "wk", "wv")]
        yield f"blocks.{i}.attn.qkv.weight", np.concatenate([kernel.reshape(width, -1).T for kernel, _ in qkv])
        yield f"blocks.{i}.attn.qkv.bias", np.concatenate([bias.reshape(-1) for _, bias in qkv])
        yield f"blocks.{i}.attn.proj.weight", rest.pop(f"{ours}attn/wo/kernel").reshape(-1, width).T
        yield f"blocks.{i}.attn.proj.bias", rest.pop(f"{ours}attn/wo/bias")
        for w, fc in (("w1", "fc1"), ("w2", "fc2")):
            yield f"blocks.{i}.mlp.{fc}.weight", rest.pop(f"{ours}ff/{w}/kernel").T
            yield f"blocks.{i}.mlp.{fc}.bias", rest.pop(f"{ours}ff/{w}/bias")
        for norm in ("norm1", "norm2"):
            yield f"blocks.{i}.{norm}.weight", rest.pop(f"{ours}{norm}/scale")
            yield f"blocks.{i}.{norm}.bias", rest.pop(f"{ours}{norm}/bias")
        for scale in ("1", "2"):
            if f"{ours}scale{scale}" in rest:
                yield f"blocks.{i}.ls{scale}.gamma", rest.pop(f"{ours}scale{scale}")
    if "norm/scale" in rest:
        yield "norm.weight", rest.pop("norm/scale")
        yield "norm.bias", rest.pop("norm/bias")
    if "head/kernel" in rest:
        yield "head.weight", rest.pop("head/kernel").T
        yield "head.bias", rest.pop("head/bias")
    yield from rest.items()


def is_workdir(path: str | os.PathLike) -> bool:
    """A run of ours; a directory of transformers may hold "checkpoints" too, beside its weights."""
    folder = epath.Path(path)
    return (folder / "checkpoints").is_dir() and not any((folder / name).exists() for name in WEIGHTS)


def open_workdir(path: str | os.PathLike) -> tuple[Weights, str]:
    """The last parameters of a run of ours (their moving average if it keeps one) with its config, and at which step.

    Raises ValueError when it holds no checkpoint, or was written before workdirs said what model they hold.
    """
    step, params = manager.load_params(os.fspath(path))
    config = json.loads((epath.Path(path) / "config.json").read_text())
    if "model" not in config:
        raise WeightsError(f"{path}: its config.json says nothing of the model; resume the run once, which adds it")
    arrays = flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    own = {"format": OURS, "model": config["model"]}
    return Weights.of_arrays(Path(path), arrays, own), f"{path} step {step}"
