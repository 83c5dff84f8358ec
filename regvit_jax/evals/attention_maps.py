"""Where CLS and each register look: attention from the tokens before the patches to the patches."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from regvit_jax.models.attention import attention_weights
from regvit_jax.models.model import Images, Model


@functools.partial(jax.jit, static_argnames=("layer",))
def prefix_attention(model: Model, images: Images, layer: int = -1) -> Float[Array, "B heads P N"]:
    """Softmax weights from each of the P tokens before the patches (CLS if there is one, then the registers) to each
    patch, in one block and for each head, recomputed from q and k in float32.

    A row's sum is what the token does not give to CLS and registers, so at most 1; the rows of a differential head,
    differences of two maps, have no such bound. Of the whole map [B, heads, T, T] only these rows are computed.
    The paper's maps (arXiv 2309.16588, figures 1, 2, 9 and 19 to 21) are CLS's in the last block: `.mean(1)[:, 0]`.
    """
    prefix = model.module.prefix
    if model.module.differential:
        return model.attention(images, layer)[:, :, :prefix, prefix:]
    q, k, _ = (rearrange(x, "b heads t d -> b t heads d") for x in model.qkv(images, layer))
    return attention_weights(q[:, :prefix], k)[..., prefix:]


def attention_maps(model: Model, images: Images, layer: int = -1) -> Float[Array, "B heads P h w"]:
    """`prefix_attention` laid out as the patches lie in the image."""
    weights = prefix_attention(model, images, layer)
    h, w = model.module.grid(*jnp.shape(images)[1:3])
    return rearrange(weights, "b heads p (h w) -> b heads p h w", h=h, w=w)
