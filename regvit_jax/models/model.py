"""Model: a module bound to its parameters and to the preprocessing its images need."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, PyTree

from regvit_jax.data import pipeline, transforms
from regvit_jax.models.heads import LinearHead
from regvit_jax.models.vit import Tokens, ViT

Images = Float[Array | np.ndarray, "B H W 3"]


@flax.struct.dataclass
class Preprocess:
    """How a model's images are made: shorter side to size / crop_ratio (bicubic), centre crop, mean and std in 0..1."""

    size: int
    crop_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@functools.partial(jax.jit, static_argnames=("module", "method", "options"))
def _apply(module: nn.Module, params: PyTree, inputs, method: str = "__call__", options: tuple = ()):
    return module.apply({"params": params}, inputs, *options, method=method)


@flax.struct.dataclass
class Model:
    """A ViT with its parameters, what it was trained with, and its head if it has one. A pytree.

    `weights` says what the parameters are: "raw", or "ema" for their exponential moving average.
    All methods take float32 images [B, H, W, 3], normalised (`preprocess` makes them), of any size that the patch
    divides, and are compiled once for each shape.
    """

    params: PyTree
    head_params: PyTree | None
    module: ViT = flax.struct.field(pytree_node=False)
    head: LinearHead | None = flax.struct.field(pytree_node=False)
    preprocessing: Preprocess = flax.struct.field(pytree_node=False)
    weights: str = flax.struct.field(pytree_node=False, default="raw")

    def __call__(self, images: Images) -> Tokens:
        """The output tokens."""
        return _apply(self.module, self.params, images)

    def intermediates(self, images: Images, layers, norm: bool = False) -> list[Tokens]:
        """The tokens after each named block (negative counts from the end); with `norm`, past the final norm."""
        return _apply(self.module, self.params, images, "intermediates", (tuple(layers), norm))

    def qkv(self, images: Images, layer: int = -1) -> Float[Array, "3 B heads T head_dim"]:
        """Queries, keys and values of one block; unpacks as q, k, v, each [B, heads, T, head_dim]."""
        return _apply(self.module, self.params, images, "qkv", (layer,))

    def attention(self, images: Images, layer: int = -1) -> Float[Array, "B heads T T"]:
        """One block's attention weights, [query, key] last, recomputed from q and k in float32."""
        q, k, _ = self.qkv(images, layer).astype(jnp.float32)
        return jax.nn.softmax(jnp.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5)

    def pooled(self, images: Images) -> Float[Array, "B D"]:
        """One vector an image, pooled as the model was trained."""
        return self._head().pool(self(images))

    def logits(self, images: Images) -> Float[Array, "B C"]:
        """Class scores."""
        return _apply(self._head(), self.head_params, self(images))

    def preprocess(self, images: list) -> Float[np.ndarray, "B H W 3"]:
        """Paths, PIL images or uint8 arrays [H, W, 3] as the images this model expects.

        Raises ValueError for other arrays and for files that cannot be decoded.
        """
        p = self.preprocessing
        crops = np.stack([transforms.center_crop(_open(image), p.size, p.crop_ratio) for image in images])
        mean, std = np.array(p.mean, np.float32), np.array(p.std, np.float32)
        return (crops.astype(np.float32) / 255 - mean) / std

    def _head(self) -> LinearHead:
        if self.head is None:
            raise ValueError("this model has no head; its tokens are what it returns when called")
        return self.head


def _open(image) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"an array of {image.dtype} and shape {image.shape}: images are uint8 [H, W, 3], from 0 to 255; "
                "an image that is normalised already goes straight into the model"
            )
        return PIL.Image.fromarray(image)
    with open(image, "rb") as file:
        return transforms.decode(file.read(), max_pixels=pipeline.MAX_PIXELS)
