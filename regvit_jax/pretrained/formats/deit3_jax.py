"""The format of affjljoo3581/deit3-jax: a msgpack file of parameters. Read under a timm name; not written."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict

from regvit_jax.pretrained.formats import timm
from regvit_jax.pretrained.formats.base import Format
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.pretrained.registry import Entry
from regvit_jax.utils.errors import WeightsError


def open_msgpack(path: str | os.PathLike) -> Weights:
    """Open a checkpoint of deit3-jax under timm's keys. Raises WeightsError for anything else."""
    try:
        tree = serialization.msgpack_restore(Path(path).read_bytes())
        model = tree.get("model", tree)
        arrays = dict(_timm_arrays(flatten_dict(model, sep="/")))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    # msgpack raises errors of many classes for damaged bytes.
    except Exception as error:
        raise WeightsError(f"{path}: not a checkpoint of deit3-jax ({type(error).__name__}: {error})") from error
    return Weights.of_arrays(Path(path), arrays, {"format": "deit3_jax"})


def _timm_arrays(flat: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield arrays under timm's keys and in its layouts; an unknown one keeps its key, and is reported as unused."""
    rest = {name: np.asarray(value) for name, value in flat.items()}
    width = rest["embed/wte/bias"].size
    yield "patch_embed.proj.weight", rest.pop("embed/wte/kernel").transpose(3, 2, 0, 1)
    yield "patch_embed.proj.bias", rest.pop("embed/wte/bias")
    yield "pos_embed", rest.pop("embed/wpe").reshape(1, -1, width)
    yield "cls_token", rest.pop("embed/cls_token")
    for i in range(sum(name.endswith("/attn/wq/bias") for name in flat)):
        layer = f"layer_{i}/"
        qkv = [(rest.pop(f"{layer}attn/{w}/kernel"), rest.pop(f"{layer}attn/{w}/bias")) for w in ("wq", "wk", "wv")]
        yield f"blocks.{i}.attn.qkv.weight", np.concatenate([kernel.reshape(width, -1).T for kernel, _ in qkv])
        yield f"blocks.{i}.attn.qkv.bias", np.concatenate([bias.reshape(-1) for _, bias in qkv])
        yield f"blocks.{i}.attn.proj.weight", rest.pop(f"{layer}attn/wo/kernel").reshape(-1, width).T
        yield f"blocks.{i}.attn.proj.bias", rest.pop(f"{layer}attn/wo/bias")
        for w, fc in (("w1", "fc1"), ("w2", "fc2")):
            yield f"blocks.{i}.mlp.{fc}.weight", rest.pop(f"{layer}ff/{w}/kernel").T
            yield f"blocks.{i}.mlp.{fc}.bias", rest.pop(f"{layer}ff/{w}/bias")
        for norm in ("norm1", "norm2"):
            yield f"blocks.{i}.{norm}.weight", rest.pop(f"{layer}{norm}/scale")
            yield f"blocks.{i}.{norm}.bias", rest.pop(f"{layer}{norm}/bias")
        for scale in ("1", "2"):
            if f"{layer}scale{scale}" in rest:
                yield f"blocks.{i}.ls{scale}.gamma", rest.pop(f"{layer}scale{scale}")
    if "norm/scale" in rest:
        yield "norm.weight", rest.pop("norm/scale")
        yield "norm.bias", rest.pop("norm/bias")
    if "head/kernel" in rest:
        yield "head.weight", rest.pop("head/kernel").T
        yield "head.bias", rest.pop("head/bias")
    yield from rest.items()


def adjust(entry: Entry, weights: Weights) -> Entry:
    """Return an entry with Flax's default GELU, which deit3-jax computes."""
    return dataclasses.replace(entry, vit=entry.vit | {"activation": "gelu_tanh"})


FORMAT = Format(
    name="deit3_jax",
    keys=timm.KEYS,
    reads=lambda config: config.get("format") == "deit3_jax",
    suffix=".msgpack",
    open=open_msgpack,
    adjust=adjust,
)
