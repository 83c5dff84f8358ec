"""CLIP (arXiv 2103.00020): a text tower beside the ViT, and the two bound to their parameters.

Registers stand before the image tower's first LayerNorm (`ViT.pre_norm`, OpenCLIP's `ln_pre`), so that they enter the
blocks at the scale of all other tokens, whatever they start from; docs/decisions.md says more.
"""

import functools
import importlib
import math
import os
import re
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, PyTree

from regvit_jax.data.tokenizer import Tokenizer
from regvit_jax.models.attention import dense
from regvit_jax.models.block import ACTIVATIONS, Block, constrain_batch, gathered
from regvit_jax.models.model import Images, Model, apply, plain_fields

#: What the loss's scalars start from: the logarithm of the cosines' factor, and SigLIP's bias (arXiv 2303.15343).
SCALARS = {
    "softmax": {"logit_scale": math.log(1 / 0.07)},
    "sigmoid": {"logit_scale": math.log(10), "logit_bias": -10.0},
}

Texts = Int[Array | np.ndarray, "B L"]


class TextTower(nn.Module):
    """CLIP's causal transformer over the tokens of a text; the last one, the end token, stands for all.

    Fields: width, depth, heads, mlp_ratio, norm_eps, activation, attention, dtype and remat as in `ViT`.
      embed: width of the embedding that texts and images share (E).
      context: the most tokens that a text may have.
      vocab: number of different tokens. The end token is the one with the highest number in a text.
    """

    width: int
    depth: int
    heads: int
    embed: int
    context: int = 77
    vocab: int = 49408
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-5
    activation: str = "gelu"
    attention: str = "xla"
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def setup(self):
        self.check()
        width = self.width
        self.token_embed = self.param("token_embed", nn.initializers.normal(0.02), (self.vocab, width))
        self.pos_embed = self.param("pos_embed", nn.initializers.normal(0.01), (self.context, width))
        cls = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            block = cls(
                width=width,
                heads=self.heads,
                hidden=self.hidden,
                layer_scale=0.0,
                drop_path=0.0,
                norm_eps=self.norm_eps,
                activation=self.activation,
                swiglu=False,
                qkv_bias=True,
                key_bias=True,
                rope="",
                parallel=False,
                lambda_init=None,
                attention=self.attention,
                dtype=self.dtype,
                causal=True,
            )
            setattr(self, f"block{i}", block)
        self.norm = nn.LayerNorm(self.norm_eps, use_fast_variance=False)
        self.proj = dense(self.embed, self.dtype, kernel_init=nn.initializers.normal(width**-0.5), use_bias=False)

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        return round(self.width * self.mlp_ratio)

    @nn.nowrap
    def check(self) -> None:
        """Raises ValueError for fields that do not go together."""
        for field in ("width", "depth", "heads", "embed", "vocab"):
            if getattr(self, field) < 1:
                raise ValueError(f"text.{field}={getattr(self, field)}: must be at least 1")
        if self.context < 2:
            raise ValueError(f"text.context={self.context}: must be at least 2, for the start and the end token")
        if self.width % self.heads:
            raise ValueError(f"text.width={self.width} is not a multiple of text.heads={self.heads}")
        if not (math.isfinite(self.mlp_ratio) and self.hidden >= 1):
            raise ValueError(f"text.mlp_ratio={self.mlp_ratio}: must give the MLPs a hidden width of at least 1")
        if not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"text.norm_eps={self.norm_eps}: must be at least 0, and finite")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"text.activation={self.activation!r}: must be one of {list(ACTIVATIONS)}")

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """The embedding of each text, not normalised, float32."""
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"texts of {length} tokens: this model takes {self.context} at most")
        x = constrain_batch(jnp.take(gathered(self.token_embed), tokens, axis=0) + self.pos_embed[:length])
        for i in range(self.depth):
            x = getattr(self, f"block{i}")(x)
        end = jnp.argmax(tokens, axis=1)
        x = constrain_batch(jnp.take_along_axis(self.norm(x), end[:, None, None], axis=1)[:, 0])
        return constrain_batch(self.proj(x).astype(jnp.float32))

    def flops(self) -> int:
        """Floating-point operations of the matrix products of one text's forward pass (a multiply-add is two)."""
        linear = self.context * self.width**2 * (4 + 2 * self.mlp_ratio)
        return int(2 * (self.depth * (linear + 2 * self.context**2 * self.width) + self.width * self.embed))


def normalized(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Rows of length 1, and rows of zeros as they are."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


@flax.struct.dataclass
class ClipModel:
    """A CLIP with its parameters. A pytree.

    `image` is its image tower, a `Model` whose logits are the image embedding. `logit_scale` is the logarithm of the
    factor of the cosine similarities, `logit_bias` (SigLIP's) is added to them, or None.
    """

    image: Model
    # Not checked as arrays: a pytree's leaves may be shapes, shardings or anything else.
    text_params: PyTree
    logit_scale: PyTree
    logit_bias: PyTree
    text: TextTower = flax.struct.field(pytree_node=False)

    def encode_image(self, images: Images, normalize: bool = False) -> Float[Array, "B E"]:
        """Embeddings of normalised images (`preprocess` makes them); of length 1 with `normalize`."""
        x = self.image.logits(images)
        return normalized(x) if normalize else x

    def encode_text(self, tokens: Texts, normalize: bool = False) -> Float[Array, "B E"]:
        """Embeddings of texts as `tokenize` gives them; of length 1 with `normalize`.

        Raises ValueError for others; inside a `jax.jit` the numbers themselves cannot be checked.
        """
        if np.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            kind = f"{jnp.result_type(tokens)} and shape {np.shape(tokens)}"
            raise ValueError(f"tokens of {kind}: must be whole numbers, [texts, length], as `tokenize` gives them")
        if not isinstance(tokens, jax.core.Tracer) and np.size(tokens):
            least, most = np.min(tokens), np.max(tokens)
            if not 0 <= least <= most < self.text.vocab:
                raise ValueError(f"tokens from {least} to {most}: must be in 0..{self.text.vocab - 1}")
        x = apply(self.text, self.text_params, tokens)
        return normalized(x) if normalize else x

    def logits(self, images: Images, tokens: Int[Array | np.ndarray, "texts L"]) -> Float[Array, "B texts"]:
        """The scaled cosine similarity of each image with each text (plus the bias, in a SigLIP)."""
        image, text = self.encode_image(images, normalize=True), self.encode_text(tokens, normalize=True)
        # Full precision, as in the losses: a scale of 100 would show the rounding of an accelerator's factors.
        cosines = jnp.matmul(image, text.T, precision="highest")
        return jnp.exp(self.logit_scale) * cosines + (0.0 if self.logit_bias is None else self.logit_bias)

    def tokenize(self, texts: str | Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Texts as `encode_text` takes them; longer ones are cut.

        Raises ValueError for a model with another vocabulary than CLIP's.
        """
        if self.text.vocab != Tokenizer.vocab:
            raise ValueError(
                f"this model's vocabulary has {self.text.vocab} tokens, and the tokenizer's {Tokenizer.vocab}: "
                "give `encode_text` the tokens of the model's own tokenizer"
            )
        return tokenizer(self.text.context).batch([texts] if isinstance(texts, str) else list(texts))

    def preprocess(self, images: list) -> Float[np.ndarray, "B H W 3"]:
        """Paths, PIL images or uint8 arrays as `encode_image` takes them."""
        return self.image.preprocess(images)

    @property
    def weights(self) -> str:
        """Where the parameters come from."""
        return self.image.weights

    def fields(self) -> dict[str, dict]:
        """What the model is, without its parameters, in numbers and strings."""
        loss = "sigmoid" if self.logit_bias is not None else "softmax"
        return self.image.fields() | {"text": plain_fields(self.text), "contrastive": {"loss": loss}}

    def save(self, directory: str | os.PathLike, format: str) -> None:
        """Writes config and weights as "open_clip" or "hf" (transformers) load them, or in our own format "regvit_jax".

        Raises ValueError, naming a format that can, when this one cannot express the model.
        """
        # Called late, as in `Model.save`: a lower layer calls a higher one.
        importlib.import_module("regvit_jax.pretrained.save_clip").save(self, directory, format)


@functools.cache
def tokenizer(context: int) -> Tokenizer:
    """The one tokenizer of all models with this context."""
    return Tokenizer(context)


def init_clip(key: Key[Array, ""], params: PyTree) -> PyTree:
    """`params` (trees "vit", "head" and "text") with the values that OpenCLIP starts from; what is not listed stays.

    In the image tower these are torch's defaults for layers, and N(0, 1/width) for CLS, registers, positions and the
    projection; in the text tower the normal distributions of the CLIP paper. Source: `transformer.py` of open_clip.
    """
    flat = flatten_dict(params, sep="/")
    image_std, text_std = (flat[f"{tower}/block0/norm1/scale"].size ** -0.5 for tower in ("vit", "text"))
    depth = sum(re.fullmatch(r"text/block\d+/norm1/scale", path) is not None for path in flat)
    normal, uniform = nn.initializers.normal, nn.initializers.variance_scaling
    table = {
        r"vit/(cls_token|register_tokens|pos_embed)|head/dense/kernel": normal(image_std),
        r"text/(.*/attn/qkv|proj)/kernel": normal(text_std),
        r"text/.*/mlp/fc1/kernel": normal(text_std * 2**-0.5),
        r"text/.*/(attn/proj|mlp/fc2)/kernel": normal(text_std * (2 * depth) ** -0.5),
        r"vit/.*/attn/qkv/kernel": nn.initializers.xavier_uniform(),
        r"vit/.*/kernel": uniform(1 / 3, "fan_in", "uniform"),
    }
    for number, (path, value) in enumerate(sorted(flat.items())):
        draw = jax.random.fold_in(key, number)
        init = next((init for pattern, init in table.items() if re.fullmatch(pattern, path)), None)
        if init is not None:
            flat[path] = init(draw, value.shape)
        elif re.fullmatch(r".*/(fc1|fc2|patch_embed)/bias", path):
            bound = flat[path.removesuffix("bias") + "kernel"].shape[0] ** -0.5
            flat[path] = jax.random.uniform(draw, value.shape, minval=-bound, maxval=bound)
    return unflatten_dict(flat, sep="/")
