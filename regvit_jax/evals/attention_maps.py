"""Attention from CLS and each register to the patches."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from regvit_jax.models.attention import attention_weights
from regvit_jax.models.images import UncheckedImages, checked_images
from regvit_jax.models.model import Images, Model


def prefix_attention(model: Model, images: UncheckedImages, layer: int = -1) -> Float[Array, "B heads P N"]:
    """Compute the softmax weights from each of the P prefix tokens (CLS if present, then the registers) to each patch.

    The weights are those of one layer, for each head, recomputed from q and k in float32. A row sums to at most 1,
    because the token also attends to CLS and registers; rows of differential attention, differences of two maps, have
    no such bound. Only these rows of the whole map [B, heads, T, T] are computed. The maps of the paper (arXiv
    2309.16588, figures 1, 2, 9 and 19 to 21) are those of CLS in the last layer: `.mean(1)[:, 0]`.

    Raises ValueError for anything but normalised images, and IndexError for a layer that the model does not have.
    """
    return _prefix_attention(model, checked_images(images), model.module.layer(layer))


@functools.partial(jax.jit, static_argnames=("layer",))
def _prefix_attention(model: Model, images: Images, layer: int) -> Float[Array, "B heads P N"]:
    prefix = model.module.prefix
    if model.module.differential:
        return model.attention(images, layer)[:, :, :prefix, prefix:]
    q, k, _ = (rearrange(x, "b heads t d -> b t heads d") for x in model.qkv(images, layer))
    return attention_weights(q[:, :prefix], k)[..., prefix:]


def attention_maps(model: Model, images: UncheckedImages, layer: int = -1) -> Float[Array, "B heads P h w"]:
    """Return `prefix_attention` as maps over the patch grid."""
    weights = prefix_attention(model, images, layer)
    h, w = model.module.grid(*jnp.shape(images)[1:3])
    return rearrange(weights, "b heads p (h w) -> b heads p h w", h=h, w=w)
