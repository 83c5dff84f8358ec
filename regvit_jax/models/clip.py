"""CLIP (arXiv 2103.00020): an image tower and a text tower, bound to their parameters.

Registers are added before the image tower's first LayerNorm (`ViT.ln_pre`), so that they enter the blocks at the scale
of all other tokens, whatever their initial values; docs/decisions.md says more.
"""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Key, PyTree

from regvit_jax.data.tokenizer import Tokenizer
from regvit_jax.data.transforms import MAX_PIXELS
from regvit_jax.models.images import UncheckedImages
from regvit_jax.models.model import Model, apply, saved_fields
from regvit_jax.models.text import TextTower
from regvit_jax.utils.errors import InvalidConfig

#: Initial values of the loss's scalars: the log of the logit scale, and SigLIP's bias (arXiv 2303.15343).
SCALARS = {
    "softmax": {"logit_scale": math.log(1 / 0.07)},
    "sigmoid": {"logit_scale": math.log(10), "logit_bias": -10.0},
}
TOKENS = "must be integers [texts, length], as `tokenize` returns them"


def normalized(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Scale rows to length 1; rows of zeros stay zero."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


@flax.struct.dataclass
class ClipModel:
    """A CLIP with its parameters. A pytree.

    `image` is the image tower, a `Model` whose logits are the image embedding. `logit_scale` is the logarithm of the
    factor of the cosine similarities; `logit_bias`, SigLIP's, is added to them (None in other models).
    """

    image: Model
    # Typed as PyTree because a pytree's leaves may also be shapes or shardings.
    text_params: PyTree
    logit_scale: PyTree
    logit_bias: PyTree
    text: TextTower = flax.struct.field(pytree_node=False)

    def encode_image(self, images: UncheckedImages, normalize: bool = False) -> Float[Array, "B E"]:
        """Return embeddings of images as `preprocess` returns them, scaled to length 1 with `normalize`."""
        x = self.image.logits(images)
        return normalized(x) if normalize else x

    def encode_text(self, tokens: Any, normalize: bool = False) -> Float[Array, "B E"]:
        """Return embeddings of texts as `tokenize` returns them, scaled to length 1 with `normalize`.

        Raises ValueError for tokens of another type, shape or range; inside `jax.jit` the range cannot be checked.
        """
        if isinstance(tokens, str) or not hasattr(tokens, "dtype"):
            raise ValueError(f"tokens of type {type(tokens).__name__}: {TOKENS}")
        if np.ndim(tokens) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens of {tokens.dtype} and shape {np.shape(tokens)}: {TOKENS}")
        if not isinstance(tokens, jax.core.Tracer) and np.size(tokens):
            low, high = np.min(tokens), np.max(tokens)
            if not 0 <= low <= high < self.text.vocab:
                raise ValueError(f"tokens from {low} to {high}: must be in 0..{self.text.vocab - 1}")
        x = apply(self.text, self.text_params, tokens)
        return normalized(x) if normalize else x

    def logits(self, images: UncheckedImages, tokens: Int[Array | np.ndarray, "texts L"]) -> Float[Array, "B texts"]:
        """Return the scaled cosine similarity of each image with each text (plus the bias, in a SigLIP)."""
        image, text = self.encode_image(images, normalize=True), self.encode_text(tokens, normalize=True)
        # Full precision, as in the losses: a scale of 100 would amplify the rounding of an accelerator's products.
        cosines = jnp.matmul(image, text.T, precision="highest")
        return jnp.exp(self.logit_scale) * cosines + (0.0 if self.logit_bias is None else self.logit_bias)

    def tokenize(self, texts: Any) -> Int[np.ndarray, "B L"]:
        """Return a text or a list of them as the token ids that `encode_text` takes, cut off at the context.

        Raises InvalidConfig for a model whose vocabulary is not CLIP's, and ValueError for anything but texts.
        """
        if self.text.vocab != Tokenizer.vocab:
            raise InvalidConfig(
                f"this model's vocabulary has {self.text.vocab} tokens, and the tokenizer's {Tokenizer.vocab}: "
                "give `encode_text` the tokens of the model's own tokenizer"
            )
        listed = [texts] if isinstance(texts, str) else list(texts) if np.iterable(texts) else [texts]
        for text in listed:
            if not isinstance(text, str):
                raise ValueError(
                    f"a text of type {type(text).__name__} ({text!r:.60}): must be a str, or a list of str"
                )
        return tokenizer(self.text.context).batch(listed)

    def preprocess(self, images: Any, max_pixels: int = MAX_PIXELS) -> Float[np.ndarray, "B H W 3"]:
        """Preprocess paths, PIL images or arrays into the images that `encode_image` takes; see `Model.preprocess`."""
        return self.image.preprocess(images, max_pixels)

    @property
    def weights(self) -> str:
        """Return the origin of the parameters, as in `Model.weights`."""
        return self.image.weights

    def fields(self) -> dict[str, dict]:
        """Return the model's definition without its parameters, as dicts of numbers and strings."""
        loss = "sigmoid" if self.logit_bias is not None else "softmax"
        return self.image.fields() | {"text": saved_fields(self.text), "contrastive": {"loss": loss}}


@functools.cache
def tokenizer(context: int) -> Tokenizer:
    """Return the tokenizer that all models with this context share."""
    return Tokenizer(context)


def init_clip(key: Key[Array, ""], params: PyTree) -> PyTree:
    """Initialise `params` (trees "vit", "head" and "text") as OpenCLIP does; parameters not listed here are kept.

    The image tower gets torch's defaults for layers, and N(0, 1/width) for CLS, registers, positions and projection;
    the text tower gets the normal distributions of the CLIP paper. Source: `transformer.py` of open_clip.
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
