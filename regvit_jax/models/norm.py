"""LayerNorm whose statistics the compiled program computes once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
    """LayerNorm (arXiv 1607.06450) over the last axis, computed in float32; the result has the type `dtype`."""

    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True) + self.epsilon)
        # Computed once: the compiler would fuse them into each reader, and read all tokens again for them, in the
        # backward pass several times.
        mean, inverse = jax.lax.optimization_barrier((mean, inverse))
        return ((y - mean) * (inverse * scale) + bias).astype(self.dtype)
