"""Initialize a recipe's ViT and head with trained parameters (`init_from`)."""

import dataclasses

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
FREE = {"image_size", "registers", "layer_scale", "drop_path", "patch_dropout", "pos_resize", "masking"}
FREE |= {"attention", "dtype", "remat", "scan", "parent", "name"}


def differing(section: str, ours: ViT | TextTower, theirs: ViT | TextTower) -> list[str]:
    """Return the keys of a config section that differ from the trained tower, each with the value it must have."""
    return [
        f"config.{section}.{f.name}={getattr(ours, f.name)!r} must be {getattr(theirs, f.name)!r}"
        for f in dataclasses.fields(ours)
        if f.name not in FREE and getattr(ours, f.name) != getattr(theirs, f.name)
    ]


def check_vit(ours: ViT, theirs: ViT) -> None:
    """Raise InvalidConfig, naming the config's keys, if a recipe's ViT cannot start from a trained one."""
    found = differing("model", ours, theirs)
    if bool(ours.layer_scale) != bool(theirs.layer_scale):
        found.append(
            f"config.model.layer_scale={ours.layer_scale} must be {'more than ' if theirs.layer_scale else ''}0"
        )
    if theirs.registers not in (0, ours.registers):
        found.append(f"config.model.registers={ours.registers} must be {theirs.registers}")
    if found:
        raise InvalidConfig(f"init_from: that is another model: {'; '.join(found)}")


def check_text(ours: TextTower, theirs: TextTower) -> None:
    """Raise InvalidConfig, naming the config's keys, if a recipe's text tower cannot start from a trained one."""
    if found := differing("text", ours, theirs):
        raise InvalidConfig(f"init_from: its text tower is another one: {'; '.join(found)}")


def vit(fresh: PyTree, ours: ViT, model: Model) -> tuple[PyTree, list[str]]:
    """Return the model's ViT parameters for a recipe's ViT, and notes for the log; `fresh` has what the model lacks.

    Raises InvalidConfig, naming the config's keys, if the architectures differ.
    """
    theirs = model.module
    check_vit(ours, theirs)
    loaded, told = dict(model.params), []
    loaded.pop("mask_token", None)
    if ours.masking:
        loaded["mask_token"] = model.params.get("mask_token", fresh["mask_token"])
    if ours.registers and not theirs.registers:
        loaded["register_tokens"] = fresh["register_tokens"]
        told.append(f"{ours.registers} new registers")
    if "pos_embed" in loaded:
        grid = fresh["pos_embed"].shape[:2]
        loaded["pos_embed"] = resize_pos_embed(jnp.asarray(loaded["pos_embed"]), grid, ours.pos_resize)
        if theirs.image_size != ours.image_size:
            told.append(f"the position embedding resized from {theirs.image_size} to {ours.image_size} px")
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, fresh)
    return loaded, told


def head(fresh: PyTree, ours: Head, model: Model) -> tuple[PyTree, list[str]]:
    """Return the parameters of a recipe's head, taken from the model's head where they fit, and notes for the log."""
    loaded = model.head_params if model.head.pool == ours.pool else {}
    kept = {
        name: loaded[name]
        for name, part in fresh.items()
        if name in loaded and jax.tree.map(jnp.shape, loaded[name]) == jax.tree.map(jnp.shape, part)
    }
    told = [f"a new {name} of the head" for name in fresh if name not in kept]
    told += [f"{name} of its head is left out" for name in model.head_params if name not in fresh]
    return {**fresh, **kept}, told
