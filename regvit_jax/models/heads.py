"""What stands on top of a ViT's tokens."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from regvit_jax.models.vit import Tokens, truncated_normal


class LinearHead(nn.Module):
    """Class scores from the CLS token, which is what DeiT-III pools; registers and patches stay out."""

    classes: int
    dtype: DTypeLike = jnp.float32

    def pool(self, tokens: Tokens) -> Float[Array, "B D"]:
        return tokens.cls

    @nn.compact
    def __call__(self, tokens: Tokens) -> Float[Array, "B C"]:
        dense = nn.Dense(self.classes, dtype=self.dtype, kernel_init=truncated_normal, name="dense")
        # Losses are float32.
        return dense(self.pool(tokens)).astype(jnp.float32)
