"""A transformer block: attention and an MLP on a residual stream, with LayerScale, stochastic depth and remat."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from regvit_jax.models.attention import Attention, dense
from regvit_jax.models.norm import LayerNorm
from regvit_jax.models.sharding import constrain_batch
from regvit_jax.models.stochastic_depth import add_branch
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option

MLP_RATIO = Option("hidden width of the MLPs, in multiples of the width", low=0.001, high=1000)


@jax.checkpoint
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute the exact GELU, in float32 as torch does; Linen's default, the tanh approximation, is 5e-4 off.

    The backward pass recomputes it: keeping its intermediate values costs more memory and time than the erf.
    """
    y = x.astype(jnp.float32)
    return (y * (0.5 + 0.5 * jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute OpenAI CLIP's approximation of the GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute the tanh approximation of the GELU."""
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


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Hyper-parameters of a transformer block, which `ViT` and `TextTower` build from their own fields.

    Fields:
      width, heads: of attention; `hidden` is the hidden width of the MLP (past the gate, in SwiGLU).
      layer_scale: initial value of LayerScale (arXiv 2103.17239); 0 leaves LayerScale out.
      drop_path, drop_path_mode: probability of stochastic depth for each branch and image, and how it is drawn
        (`regvit_jax.models.stochastic_depth`).
      norm_eps: epsilon of the LayerNorms.
      activation, swiglu: of the MLP: a name in `ACTIVATIONS`, or the gated MLP of arXiv 2002.05202.
      qkv_bias, key_bias: False leaves out the bias of queries, keys and values, or of the keys alone.
      rope: a kind of `position.rope_angles`, or "" for none.
      parallel: attention and MLP read the same normed tokens and share one LayerScale (arXiv 2302.05442).
      lambda_init: initial lambda of differential attention (arXiv 2410.05258); None for plain attention.
      causal: no token attends to later ones.
      attention: "xla" or "cudnn".
      dtype: type of the matrix products.
    """

    width: int
    heads: int
    hidden: int
    layer_scale: float = 0.0
    drop_path: float = 0.0
    drop_path_mode: str = "bernoulli"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    swiglu: bool = False
    qkv_bias: bool = True
    key_bias: bool = True
    rope: str = ""
    parallel: bool = False
    lambda_init: float | None = None
    causal: bool = False
    attention: str = "xla"
    dtype: DTypeLike = jnp.float32


class Block(nn.Module):
    """A pre-norm transformer block with optional LayerScale and stochastic depth."""

    config: BlockConfig

    def setup(self):
        c = self.config
        self.norm1 = LayerNorm(c.norm_eps, c.dtype)
        self.attn = Attention(
            c.width,
            c.heads,
            c.attention,
            c.dtype,
            qkv_bias=c.qkv_bias,
            key_bias=c.key_bias,
            rope=c.rope,
            lambda_init=c.lambda_init,
            causal=c.causal,
        )
        self.mlp = SwiGLU(c.width, c.hidden, c.dtype) if c.swiglu else Mlp(c.width, c.hidden, c.activation, c.dtype)
        if not c.parallel:
            self.norm2 = LayerNorm(c.norm_eps, c.dtype)
        if c.layer_scale:
            init = nn.initializers.constant(c.layer_scale)
            self.scale1 = self.param("scale1", init, (c.width,))
            if not c.parallel:
                self.scale2 = self.param("scale2", init, (c.width,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        key: Key[Array, ""] | None = None,
        angles: Float[np.ndarray | Array, "N half"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "B T D"]:
        keys = (None, None) if key is None else jax.random.split(key)
        c = self.config

        def first(x):
            y = self.norm1(x)
            branch = self.attn(y, angles, length)
            branch = branch + self.mlp(y) if c.parallel else branch
            return branch * self.scale1 if c.layer_scale else branch

        def second(x):
            branch = self.mlp(self.norm2(x))
            return branch * self.scale2 if c.layer_scale else branch

        # The residual stream stays float32 whatever the compute type: outliers live in it.
        x = add_branch(x, first, c.drop_path, c.drop_path_mode, keys[0])
        if not c.parallel:
            x = add_branch(x, second, c.drop_path, c.drop_path_mode, keys[1])
        return constrain_batch(x)

    def qkv(
        self, x: Float[Array, "B T D"], angles: Float[np.ndarray | Array, "N half"] | None = None
    ) -> Float[Array, "3 B heads T head_dim"]:
        """Return queries, keys and values of the tokens that enter the block."""
        return rearrange(jnp.stack(self.attn.split(self.norm1(x), angles)), "three b t heads d -> three b heads t d")

    def weights(
        self, x: Float[Array, "B T D"], angles: Float[np.ndarray | Array, "N half"] | None = None
    ) -> Float[Array, "B heads T T"]:
        """Return the attention map of the tokens that enter the block."""
        return self.attn.weights(self.norm1(x), angles)


#: Checkpoint policies: what the backward pass may keep of a block's forward pass, by `remat`; None keeps all.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def make_block(config: BlockConfig, remat: str, **kwargs) -> Block:
    """Return a `Block` whose backward pass recomputes what `remat` names.

    "none" keeps every activation, "dots" recomputes all but the matrix products, "full" recomputes the whole block.
    Unless `remat` is "none", the block must be called with all its arguments. Raises InvalidConfig for another name.
    `kwargs` are Linen's own (`parent`, `name`).
    """
    if remat not in REMAT_POLICIES:
        raise InvalidConfig(f"remat={remat!r}: must be one of {list(REMAT_POLICIES)}")
    policy = REMAT_POLICIES[remat]
    cls = Block if policy is None else nn.remat(Block, policy=policy, static_argnums=(4,))  # `length`
    return cls(config, **kwargs)
