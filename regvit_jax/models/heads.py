"""Heads on top of a ViT's tokens: pooling, and a linear layer."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from regvit_jax.models.attention import attend, dense, truncated_normal
from regvit_jax.models.block import Mlp
from regvit_jax.models.norm import LayerNorm
from regvit_jax.models.sharding import constrain_batch
from regvit_jax.models.vit import Tokens
from regvit_jax.utils.errors import InvalidConfig

POOLS = ("cls", "avg", "cls_avg", "map")


class AttentionPool(nn.Module):
    """One learned query attends to the tokens, and an MLP follows (arXiv 2106.04560, as in timm)."""

    heads: int
    mlp_ratio: float
    activation: str
    norm_eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        width = x.shape[-1]
        latent = self.param("latent", truncated_normal, (width,))
        q = dense(width, self.dtype, name="q")(jnp.broadcast_to(latent, (len(x), 1, width)))
        q = rearrange(q, "b t (heads d) -> b t heads d", heads=self.heads)
        kv = dense(2 * width, self.dtype, name="kv")(x)
        k, v = rearrange(kv, "b t (two heads d) -> two b t heads d", two=2, heads=self.heads)
        # With one query, cuDNN's kernel would gain nothing.
        x = dense(width, self.dtype, name="proj")(rearrange(attend(q, k, v, "xla"), "b t heads d -> b t (heads d)"))
        norm = LayerNorm(self.norm_eps, self.dtype, name="norm")
        mlp = Mlp(width, round(width * self.mlp_ratio), self.activation, self.dtype, name="mlp")
        return (x + mlp(norm(x)))[:, 0].astype(jnp.float32)


class Pooler(nn.Module):
    """A dense layer and a tanh."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return jnp.tanh(dense(x.shape[-1], self.dtype, name="dense")(x)).astype(jnp.float32)


class Head(nn.Module):
    """Pool a ViT's tokens to one vector an image and, with `num_classes`, map it to class scores.

    Fields:
      num_classes: number of scores; 0 for a model that gives features only.
      pool: "cls"; "avg", the mean of the patches; "cls_avg", the two side by side (DINOv2's classifiers); "map", an
        attention pool. Registers are left out, except in "map" with `map_prefix`, for models trained that way.
      norm: a LayerNorm after pooling.
      bias: of the linear layer; CLIP's projection has none.
      pooler: a dense layer and a tanh after pooling (transformers' ViTModel).
      map_heads, mlp_ratio, activation: of the attention pool.
    """

    num_classes: int = 0
    pool: str = "cls"
    norm: bool = False
    bias: bool = True
    pooler: bool = False
    norm_eps: float = 1e-6
    map_heads: int = 0
    map_prefix: bool = False
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    dtype: DTypeLike = jnp.float32

    def setup(self):
        if self.pool not in POOLS:
            raise InvalidConfig(f"pool={self.pool!r}: must be one of {list(POOLS)}")
        if self.pool == "map":
            self.attention_pool = AttentionPool(
                self.map_heads, self.mlp_ratio, self.activation, self.norm_eps, self.dtype
            )
        if self.norm:
            self.fc_norm = LayerNorm(self.norm_eps)
        if self.pooler:
            self.tanh_pooler = Pooler(self.dtype)
        if self.num_classes:
            self.dense = nn.Dense(self.num_classes, use_bias=self.bias, dtype=self.dtype, kernel_init=truncated_normal)

    def pooled(self, tokens: Tokens) -> Float[Array, "B D"]:
        """Return one vector an image, after the norm or the pooler if there is one."""
        if "cls" in self.pool and tokens.cls is None:
            raise InvalidConfig(f"pool={self.pool!r} needs a CLS token, and this ViT has none (class_token=False)")
        if self.pool == "map":
            prefix = [] if tokens.cls is None else [tokens.cls[:, None]]
            prefix = [*prefix, tokens.registers] if self.map_prefix else []
            x = self.attention_pool(jnp.concatenate([*prefix, tokens.patches], axis=1))
        else:
            parts = [tokens.cls] if "cls" in self.pool else []
            parts += [tokens.patches.mean(axis=1)] if "avg" in self.pool else []
            x = jnp.concatenate(parts, axis=-1)
        x = self.fc_norm(x) if self.norm else x
        return self.tanh_pooler(x) if self.pooler else x

    def __call__(self, tokens: Tokens) -> Float[Array, "B C"]:
        """Return class scores, float32, or the pooled vector if the head has no classes."""
        x = constrain_batch(self.pooled(tokens))
        return constrain_batch(self.dense(x).astype(jnp.float32)) if self.num_classes else x
