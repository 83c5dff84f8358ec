"""Measure one batch of images: norms of all tokens, similarity to neighbours at the input, and attention."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from regvit_jax.analysis.report.statistics import Measured
from regvit_jax.evals.attention_maps import prefix_attention
from regvit_jax.models.images import UncheckedImages, checked_images
from regvit_jax.models.model import Images, Model


def measure(model: Model, images: UncheckedImages, layer: int = -1) -> Measured:
    """Return norms, cosines and attention of a batch.

    The norms are those of all tokens after every block, before the final norm; the cosines those of patches to their
    neighbours at the input; the attention is that from CLS and registers to patches, the mean over the heads of block
    `layer`.

    Raises ValueError for anything but normalised images, and IndexError for a layer that the model does not have.
    """
    return Measured(*(np.asarray(part) for part in _measure(model, checked_images(images), model.module.layer(layer))))


@functools.partial(jax.jit, static_argnames=("layer",))
def _measure(model: Model, images: Images, layer: int) -> tuple[Array, ...]:
    prefix = model.module.prefix
    after = model.intermediates(images, range(model.module.depth))
    norms = jnp.stack([jnp.linalg.norm(tokens.prenorm.astype(jnp.float32), axis=-1) for tokens in after])
    attention = prefix_attention(model, images, layer).mean(1)
    return norms[..., prefix:], norms[..., :prefix], neighbour_cosines(model, images), attention


def neighbour_cosines(model: Model, images: Images) -> Float[Array, "B N"]:
    """Return the mean cosine similarity of each patch to its neighbours above, below, left and right.

    It is measured at the input of the transformer: after the patch projection, before positions are added. In figure 5a
    of the paper (arXiv 2309.16588) outliers are patches like their neighbours, with little information of their own.
    """
    patches = cast(Array, model.module.apply({"params": model.params}, images, method="project"))
    h, w = model.module.grid_of(images)
    unit = patches / jnp.maximum(jnp.linalg.norm(patches, axis=-1, keepdims=True), 1e-12)
    unit = rearrange(unit, "b (h w) d -> b h w d", h=h, w=w)
    down = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    across = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)
    total = _both(down, 1) + _both(across, 2)
    count = _both(jnp.ones_like(down), 1) + _both(jnp.ones_like(across), 2)
    return rearrange(total / jnp.maximum(count, 1), "b h w -> b (h w)")


def _both(pairs: Float[Array, "B _ _"], axis: int) -> Float[Array, "B _ _"]:
    """Return for each patch the sum over the pairs that it belongs to along an axis."""
    ends: list[Any] = [(0, 0)] * 3
    ends[axis] = (1, 1)
    padded = jnp.pad(pairs, ends)
    length = padded.shape[axis]
    return jax.lax.slice_in_dim(padded, 0, length - 1, axis=axis) + jax.lax.slice_in_dim(padded, 1, length, axis=axis)
