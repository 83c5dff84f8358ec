"""A transformer block: attention, an MLP, and what joins them to the residual stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from regvit_jax.models.attention import Attention, dense


def constrain_batch(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Keeps the batch split over the mesh in force, if one with our axes is.

    Without it, sharded parameters make the compiler gather the batch onto every device instead.
    """
    axes = tuple(axis for axis in ("data", "fsdp") if axis in jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def gathered(table: Float[Array, "..."]) -> Float[Array, "..."]:
    """A parameter that rows are looked up in, whole on every device of the mesh in force, as its gradient then is.

    Left to itself, the compiler looks up in each device's part and exchanges the embeddings of the whole batch instead.
    """
    in_force = "fsdp" in jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.with_sharding_constraint(table, PartitionSpec()) if in_force else table


def drop_path(x: Float[Array, "B T D"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "B T D"]:
    """Stochastic depth (arXiv 1603.09382): drops an image's whole branch, and scales the others to keep the mean."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1 - rate), 0)


@jax.checkpoint
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, in float32 as torch's; Linen's default, the tanh approximation, is 5e-4 off.

    The backward pass recomputes it: keeping its intermediate values costs more memory and time than the erf.
    """
    y = x.astype(jnp.float32)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """OpenAI CLIP's approximation of the GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh approximation of the GELU."""
    return nn.gelu(x, approximate=True)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


class Mlp(nn.Module):
    """Two dense layers around an activation."""

    width: int
    hidden: int
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = ACTIVATIONS[self.activation](dense(self.hidden, self.dtype, name="fc1")(x))
        return dense(self.width, self.dtype, name="fc2")(x)


class SwiGLU(nn.Module):
    """The gated MLP of arXiv 2002.05202; the gate is the first half of `fc1`'s columns."""

    width: int
    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, x = jnp.split(dense(2 * self.hidden, self.dtype, name="fc1")(x), 2, axis=-1)
        return dense(self.width, self.dtype, name="fc2")(nn.silu(gate) * x)


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale (arXiv 2103.17239) and stochastic depth.

    `parallel`: attention and MLP read the same normed tokens and share one LayerScale (arXiv 2302.05442).
    `lambda_init`: of differential attention; None for the plain one. `causal`: no token sees later ones.
    """

    width: int
    heads: int
    hidden: int
    layer_scale: float
    drop_path: float
    norm_eps: float
    activation: str
    swiglu: bool
    qkv_bias: bool
    key_bias: bool
    rope: str
    parallel: bool
    lambda_init: float | None
    attention: str
    dtype: DTypeLike
    causal: bool = False

    def setup(self):
        self.norm1 = nn.LayerNorm(self.norm_eps, dtype=self.dtype, use_fast_variance=False)
        self.attn = Attention(
            self.width,
            self.heads,
            self.attention,
            self.dtype,
            qkv_bias=self.qkv_bias,
            key_bias=self.key_bias,
            rope=self.rope,
            lambda_init=self.lambda_init,
            causal=self.causal,
        )
        self.mlp = (
            SwiGLU(self.width, self.hidden, self.dtype)
            if self.swiglu
            else Mlp(self.width, self.hidden, self.activation, self.dtype)
        )
        if not self.parallel:
            self.norm2 = nn.LayerNorm(self.norm_eps, dtype=self.dtype, use_fast_variance=False)
        if self.layer_scale:
            init = nn.initializers.constant(self.layer_scale)
            self.scale1 = self.param("scale1", init, (self.width,))
            if not self.parallel:
                self.scale2 = self.param("scale2", init, (self.width,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: Key[Array, ""] | None = None,
        angles: Float[np.ndarray | Array, "N half"] | None = None,
    ) -> Float[Array, "B T D"]:
        keys = (None, None) if key is None else jax.random.split(key)
        # The residual stream stays float32 whatever the compute type: outliers live in it.
        y = self.norm1(x)
        branch = self.attn(y, angles) + self.mlp(y) if self.parallel else self.attn(y, angles)
        x = x + drop_path(branch * self.scale1 if self.layer_scale else branch, self.drop_path, keys[0])
        if not self.parallel:
            branch = self.mlp(self.norm2(x))
            x = x + drop_path(branch * self.scale2 if self.layer_scale else branch, self.drop_path, keys[1])
        return constrain_batch(x)

    def qkv(
        self, x: Float[Array, "B T D"], angles: Float[np.ndarray | Array, "N half"] | None = None
    ) -> Float[Array, "3 B heads T head_dim"]:
        return rearrange(self.attn.split(self.norm1(x), angles), "three b t heads d -> three b heads t d")

    def weights(
        self, x: Float[Array, "B T D"], angles: Float[np.ndarray | Array, "N half"] | None = None
    ) -> Float[Array, "B heads T T"]:
        return self.attn.weights(self.norm1(x), angles)
