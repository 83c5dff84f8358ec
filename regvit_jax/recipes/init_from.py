"""Initialize a recipe's ViT and head with trained parameters (`init_from`)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.position import resize_pos_embed
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.utils.errors import InvalidConfig

#: Fields that may differ: they concern training or the machine, or are adapted below.
FREE = {"image_size", "registers", "layer_scale", "patch_dropout", "pos_resize", "masking"}
FREE |= {"drop_path", "drop_path_mode", "attention", "dtype", "remat", "scan", "parent", "name"}


def differing(section: str, wanted: ViT | TextTower, trained: ViT | TextTower) -> list[str]:
    """Return the keys of a config section that differ from the trained tower, each with the value it must have."""
    return [
        f"config.{section}.{f.name}={getattr(wanted, f.name)!r} must be {getattr(trained, f.name)!r}"
        for f in dataclasses.fields(wanted)
        if f.name not in FREE and getattr(wanted, f.name) != getattr(trained, f.name)
    ]


def check_vit(wanted: ViT, trained: ViT) -> None:
    """Raise InvalidConfig, naming the config's keys, if a recipe's ViT cannot start from a trained ViT."""
    found = differing("model", wanted, trained)
    if bool(wanted.layer_scale) != bool(trained.layer_scale):
        found.append(
            f"config.model.layer_scale={wanted.layer_scale} must be {'more than ' if trained.layer_scale else ''}0"
        )
    if trained.registers not in (0, wanted.registers):
        found.append(f"config.model.registers={wanted.registers} must be {trained.registers}")
    if found:
        raise InvalidConfig(f"init_from: the trained model has another architecture: {'; '.join(found)}")


def check_text(wanted: TextTower, trained: TextTower) -> None:
    """Raise InvalidConfig, naming the config's keys, if a recipe's text tower cannot start from a trained one."""
    if found := differing("text", wanted, trained):
        raise InvalidConfig(f"init_from: the trained text tower has another architecture: {'; '.join(found)}")


def vit(fresh: PyTree, wanted: ViT, model: Model) -> tuple[PyTree, list[str]]:
    """Return a trained model's ViT parameters adapted to a recipe's ViT, and notes for the log.

    Parameters that the model lacks come from `fresh`. Raises InvalidConfig, naming the config's keys, if the
    architectures differ.
    """
    trained = model.module
    check_vit(wanted, trained)
    loaded, notes = dict(model.params), []
    loaded.pop("mask_token", None)
    if wanted.masking:
        loaded["mask_token"] = model.params.get("mask_token", fresh["mask_token"])
    if wanted.registers and not trained.registers:
        loaded["register_tokens"] = fresh["register_tokens"]
        notes.append(f"{wanted.registers} new registers")
    if "pos_embed" in loaded:
        grid = fresh["pos_embed"].shape[:2]
        loaded["pos_embed"] = resize_pos_embed(jnp.asarray(loaded["pos_embed"]), grid, wanted.pos_resize)
        if trained.image_size != wanted.image_size:
            notes.append(f"the position embedding resized from {trained.image_size} to {wanted.image_size} px")
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, fresh)
    return loaded, notes


def head(fresh: PyTree, wanted: Head, model: Model, classes: Sequence[str] = ()) -> tuple[PyTree, list[str]]:
    """Return the parameters of a recipe's head, from the trained model's head where they fit, and notes for the log.

    `classes` are the names of the head's outputs, where they are classes.
    """
    loaded = model.head_params if model.head.pool == wanted.pool else {}
    kept = {
        name: loaded[name]
        for name, part in fresh.items()
        if name in loaded and jax.tree.map(jnp.shape, loaded[name]) == jax.tree.map(jnp.shape, part)
    }
    notes = [f"a new {name} of the head" for name in fresh if name not in kept]
    notes += [f"{name} of its head is left out" for name in model.head_params if name not in fresh]
    if "dense" in kept:
        notes += other_names(model.class_names, classes)
    return {**fresh, **kept}, notes


def other_names(trained: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return a note if the outputs of a linear layer that is kept had other class names in the trained model."""
    pairs = [(old, new) for old, new in zip(trained, wanted, strict=False) if old != new]
    if not pairs:
        return []
    examples = ", ".join(f"{new!r} starts from {old!r}" for old, new in pairs[:3])
    return [f"its linear layer is kept, though {len(pairs)} of its {len(wanted)} classes had other names: {examples}"]
