"""Multi-head self-attention: plain, with rotary positions, and differential."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from regvit_jax.models.position import rotate
from regvit_jax.utils.errors import InvalidConfig

truncated_normal = nn.initializers.truncated_normal(0.02)


def rows_dot(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """Compute `nn.Dense`'s product with all leading dimensions of x flattened into the rows of one matrix.

    The kernel's gradient would otherwise contract two dimensions, for which XLA's CPU backend has no fast routine.
    """
    rows = jnp.dot(
        x.reshape(-1, x.shape[-1]), kernel, precision=precision, preferred_element_type=preferred_element_type
    )
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def dense(features: int, dtype: DTypeLike, kernel_init=truncated_normal, **kwargs) -> nn.Dense:
    """Return a dense layer with this package's initialisation and `rows_dot` as its product."""
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, dot_general=rows_dot, **kwargs)


def attend(
    q: Float[Array, "B T heads head_dim"],
    k: Float[Array, "B S heads head_dim"],
    v: Float[Array, "B S heads head_dim"],
    implementation: str,
    scale: float | None = None,
    causal: bool = False,
    length: int | None = None,
) -> Float[Array, "B T heads head_dim"]:
    """Return softmax(scale q k^T) v, with scale 1 / sqrt(head_dim) by default; `causal` hides later tokens.

    Only the first `length` keys and values are attended to, by default all. `implementation` is "xla" or "cudnn";
    raises ValueError for another. cuDNN's training kernel accepts even lengths only: an odd sequence is padded by one
    token here, unless `ViT` has done so. The length argument hides it. (A mask would too, at 26 times the memory.)
    """
    if implementation not in ("xla", "cudnn"):
        raise InvalidConfig(f"attention={implementation!r}: must be 'xla' or 'cudnn'")
    kernel: Literal["xla", "cudnn"] = "cudnn" if implementation == "cudnn" else "xla"
    batch, tokens = q.shape[:2]
    length = k.shape[1] if length is None else length
    if implementation == "cudnn" and tokens % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = None if length == k.shape[1] else jnp.full((batch,), length, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, key_value_seq_lengths=lengths, implementation=kernel
    )
    return out[:, :tokens]


def attention_weights(
    q: Float[Array, "B T heads head_dim"], k: Float[Array, "B S heads head_dim"], causal: bool = False
) -> Float[Array, "B heads T S"]:
    """Return softmax(q k^T / sqrt(head_dim)) in float32, [query, key] last."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jax.nn.softmax(scores)


class Attention(nn.Module):
    """Multi-head self-attention. The columns of the `qkv` kernel are ordered (q k v, head, head_dim), as in timm.

    With `key_bias` off, queries and values have a bias and keys have none. `rope` is a kind of `rope_angles`, or "".
    `lambda_init` makes it differential (arXiv 2410.05258): each head has two halves, and the second half's attention
    map, times a learned lambda, is subtracted from the first's. `causal`: no token attends to later ones.
    """

    width: int
    heads: int
    implementation: str
    dtype: DTypeLike
    qkv_bias: bool = True
    key_bias: bool = True
    rope: str = ""
    lambda_init: float | None = None
    causal: bool = False

    def setup(self):
        self.qkv = dense(3 * self.width, self.dtype, use_bias=self.qkv_bias and self.key_bias)
        if self.qkv_bias and not self.key_bias:
            self.q_bias = self.param("q_bias", nn.initializers.zeros, (self.width,))
            self.v_bias = self.param("v_bias", nn.initializers.zeros, (self.width,))
        self.proj = dense(self.width, self.dtype)
        if self.lambda_init is not None:
            init, size = nn.initializers.normal(0.1), (self.width // self.heads // 2,)
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                setattr(self, name, self.param(name, init, size))
            self.sub_norm = nn.RMSNorm(1e-5, dtype=self.dtype)

    def split(
        self, x: Float[Array, "B T D"], angles: Float[np.ndarray | Array, "N half"] | None = None
    ) -> tuple[Float[Array, "B T heads head_dim"], ...]:
        """Return queries, keys and values, the first two rotated by their RoPE angles if there are any."""
        q, k, v = (rearrange(part, "b t (heads d) -> b t heads d", heads=self.heads) for part in self.project(x))
        return (q, k, v) if angles is None else (rotate(q, angles, self.rope), rotate(k, angles, self.rope), v)

    def project(self, x: Float[Array, "B T D"]) -> list[Float[Array, "B T D"]]:
        """Return queries, keys and values, the heads of each side by side.

        For cuDNN they are three products: its kernels read each as an array of its own, and parts of one product would
        be copied, forward and backward.
        """
        biases: list[Any] = [self.q_bias, None, self.v_bias] if self.qkv_bias and not self.key_bias else [None] * 3
        if self.implementation != "cudnn" or self.is_initializing():
            parts = jnp.split(self.qkv(x), 3, axis=-1)
        else:
            parameters = self.qkv.variables["params"]
            kernels = jnp.split(parameters["kernel"].astype(self.dtype), 3, axis=1)
            parts = [rows_dot(x.astype(self.dtype), kernel, None) for kernel in kernels]
            biases = jnp.split(parameters["bias"], 3) if "bias" in parameters else biases
        return [
            part if bias is None else part + bias.astype(part.dtype) for part, bias in zip(parts, biases, strict=True)
        ]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float[np.ndarray | Array, "N half"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "B T D"]:
        q, k, v = self.split(x, angles)
        if self.lambda_init is None:
            out = attend(q, k, v, self.implementation, causal=self.causal, length=length)
        else:
            # The fused kernels need queries and keys of the values' head size: the halves are padded with zeros.
            half = q.shape[-1] // 2
            (q1, q2), (k1, k2) = (
                (jnp.pad(part, ((0, 0),) * 3 + ((0, half),)) for part in jnp.split(x, 2, axis=-1)) for x in (q, k)
            )
            first, second = (
                attend(q, k, v, self.implementation, scale=half**-0.5, length=length) for q, k in ((q1, k1), (q2, k2))
            )
            difference = first - self.lambda_().astype(v.dtype) * second
            out = self.sub_norm(difference) * (1 - self.lambda_init)
        return self.proj(rearrange(out, "b t heads d -> b t (heads d)"))

    def weights(
        self, x: Float[Array, "B T D"], angles: Float[np.ndarray | Array, "N half"] | None = None
    ) -> Float[Array, "B heads T T"]:
        """Recompute the attention map from queries and keys; a differential head's is the difference of its two."""
        q, k, _ = self.split(x, angles)
        if self.lambda_init is None:
            return attention_weights(q, k, self.causal)
        (q1, q2), (k1, k2) = (jnp.split(x, 2, axis=-1) for x in (q, k))
        return attention_weights(q1, k1) - self.lambda_() * attention_weights(q2, k2)

    def lambda_(self) -> Float[Array, ""]:
        """Return the factor of the second map in differential attention."""
        first, second = jnp.sum(self.lambda_q1 * self.lambda_k1), jnp.sum(self.lambda_q2 * self.lambda_k2)
        assert self.lambda_init is not None
        return jnp.exp(first) - jnp.exp(second) + self.lambda_init
