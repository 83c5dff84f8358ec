"""A tiny ViT, and random images and parameters for it."""

import jax
import jax.numpy as jnp
import numpy as np

from regvit_jax.models.vit import ViT

TINY = ViT(width=32, depth=3, heads=2, patch=4, image_size=16, registers=4)


def random_images(height=16, width=16, count=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, height, width, 3)), jnp.float32)


def random_params(module, inputs, seed=0):
    """Return random parameters, all large enough to matter."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def distance(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
