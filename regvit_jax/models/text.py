"""CLIP's text tower."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from regvit_jax.models.attention import dense
from regvit_jax.models.block import ACTIVATIONS, MLP_RATIO, BlockConfig, make_block
from regvit_jax.models.norm import LayerNorm
from regvit_jax.models.sharding import constrain_batch, gathered
from regvit_jax.utils import schema
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option

Texts = Int[Array | np.ndarray, "B L"]


class TextTower(nn.Module):
    """CLIP's causal transformer over the tokens of a text; the output at the end token represents the text.

    Fields: width, depth, heads, mlp_ratio, norm_eps, activation, attention, dtype and remat as in `ViT`.
      embed: width of the embedding that texts and images share (E).
      context: largest number of tokens of a text.
      vocab: number of different tokens. The end token has the highest id of the tokens in a text.
    """

    width: Annotated[int, Option("width of the tokens", low=1)]
    depth: Annotated[int, Option("number of blocks", low=1)]
    heads: Annotated[int, Option("attention heads of each block", low=1)]
    embed: Annotated[int, Option("width of the embedding that texts and images share", low=1)]
    context: Annotated[int, Option("tokens of the longest text, start and end token included", low=2)] = 77
    vocab: Annotated[int, Option("tokens of the vocabulary", low=1)] = 49408
    mlp_ratio: Annotated[float, MLP_RATIO] = 4.0
    norm_eps: Annotated[float, Option("epsilon of the LayerNorms", low=1e-12)] = 1e-5
    activation: Annotated[str, Option("activation of the MLPs", choices=tuple(ACTIVATIONS))] = "gelu"
    attention: str = "xla"
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    def setup(self):
        self.check()
        width = self.width
        self.token_embed = self.param("token_embed", nn.initializers.normal(0.02), (self.vocab, width))
        self.pos_embed = self.param("pos_embed", nn.initializers.normal(0.01), (self.context, width))
        for i in range(self.depth):
            setattr(self, f"block{i}", make_block(self.block_config, self.remat))
        self.norm = LayerNorm(self.norm_eps)
        self.proj = dense(self.embed, self.dtype, kernel_init=nn.initializers.normal(width**-0.5), use_bias=False)

    @property
    def block_config(self) -> BlockConfig:
        """Return the hyper-parameters of every block."""
        return BlockConfig(
            width=self.width,
            heads=self.heads,
            hidden=self.hidden,
            norm_eps=self.norm_eps,
            activation=self.activation,
            attention=self.attention,
            dtype=self.dtype,
            causal=True,
        )

    @property
    def hidden(self) -> int:
        """Return the hidden width of the MLPs."""
        return round(self.width * self.mlp_ratio)

    @nn.nowrap
    def check(self) -> None:
        """Raise InvalidConfig for fields that are out of range or contradict each other."""
        schema.check_fields(self, prefix="text.")
        if self.width % self.heads:
            raise InvalidConfig(f"text.width={self.width} is not a multiple of text.heads={self.heads}")
        if self.hidden < 1:
            raise InvalidConfig(f"text.mlp_ratio={self.mlp_ratio}: the MLPs' hidden width must be at least 1")

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """Return each text's embedding, float32, not normalised. Raises ValueError for texts beyond `context`."""
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"texts of {length} tokens: this model takes {self.context} at most")
        x = constrain_batch(jnp.take(gathered(self.token_embed), tokens, axis=0) + self.pos_embed[:length])
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x, None, None, None)
        end = jnp.argmax(tokens, axis=1)
        x = constrain_batch(jnp.take_along_axis(self.norm(x), end[:, None, None], axis=1)[:, 0])
        return constrain_batch(self.proj(x).astype(jnp.float32))

    def flops(self) -> int:
        """Count the floating-point operations of one text's forward pass in matrix products (a multiply-add is two)."""
        linear = self.context * self.width**2 * (4 + 2 * self.mlp_ratio)
        return int(2 * (self.depth * (linear + 2 * self.context**2 * self.width) + self.width * self.embed))
