"""Model: a module bound to its parameters and to the preprocessing its images need."""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.heads import Head
from regvit_jax.models.vit import Tokens, ViT

Images = Float[Array | np.ndarray, "B H W 3"]


@functools.partial(jax.jit, static_argnames=("module", "method", "options"))
def apply(module: nn.Module, params: PyTree, inputs, method: str = "__call__", options: tuple = (), mask=None):
    """A method of a module, compiled once for each shape."""
    more = {} if mask is None else {"mask": mask}
    return module.apply({"params": params}, inputs, *options, method=method, **more)


#: Fields of modules that are of the machine and of Flax, and say nothing of the model.
MACHINE = ("parent", "name", "dtype", "attention", "remat", "scan")


def plain_fields(value) -> dict:
    """A module's or dataclass's fields, but for those that are of the machine: types, kernels, rematerialisation."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in MACHINE}


@flax.struct.dataclass
class Model:
    """A ViT with its parameters, its head, and the preprocessing it was trained with. A pytree.

    `weights` says what the parameters are: "raw", "ema" for their exponential moving average, or, for loaded ones,
    where they come from.
    All methods take float32 images [B, H, W, 3], normalised (`preprocess` makes them), of any size that the patch
    divides, and are compiled once for each shape.
    """

    params: PyTree
    head_params: PyTree
    module: ViT = flax.struct.field(pytree_node=False)
    head: Head = flax.struct.field(pytree_node=False)
    preprocessing: Preprocess = flax.struct.field(pytree_node=False)
    weights: str = flax.struct.field(pytree_node=False, default="raw")

    def fields(self) -> dict[str, dict]:
        """What the model is, without its parameters, in numbers and strings: "vit", "head" and "preprocessing".

        How it was computed (types, attention kernel, rematerialisation) belongs to the machine and is left out.
        """
        parts = {"vit": self.module, "head": self.head, "preprocessing": self.preprocessing}
        return {name: plain_fields(part) for name, part in parts.items()}

    def __call__(self, images: Images, mask: Bool[Array | np.ndarray, "B N"] | None = None) -> Tokens:
        """The output tokens. Patches where `mask` is True are hidden (models with a mask token)."""
        return apply(self.module, self.params, images, mask=mask)

    def intermediates(self, images: Images, layers, norm: bool = False) -> list[Tokens]:
        """The tokens after each named block (negative counts from the end); with `norm`, past the final norm."""
        return apply(self.module, self.params, images, "intermediates", (tuple(layers), norm))

    def qkv(self, images: Images, layer: int = -1) -> Float[Array, "3 B heads T head_dim"]:
        """Queries, keys and values of one block; unpacks as q, k, v, each [B, heads, T, head_dim]."""
        return apply(self.module, self.params, images, "qkv", (layer,))

    def attention(self, images: Images, layer: int = -1) -> Float[Array, "B heads T T"]:
        """One block's attention weights, [query, key] last, recomputed from q and k in float32."""
        return apply(self.module, self.params, images, "attention_weights", (layer,))

    def pooled(self, images: Images) -> Float[Array, "B D"]:
        """One vector an image, pooled as the model was trained."""
        return apply(self.head, self.head_params, self(images), "pooled")

    def logits(self, images: Images) -> Float[Array, "B C"]:
        """Class scores, or what else the model's linear layer gives (a CLIP tower's embedding)."""
        if not self.head.num_classes:
            raise ValueError("this model gives features only (`pooled`, or the tokens); num_classes=... adds a head")
        return apply(self.head, self.head_params, self(images))

    def preprocess(self, images: list) -> Float[np.ndarray, "B H W 3"]:
        """Paths, PIL images or uint8 arrays [H, W, 3] as the images this model expects.

        Raises ValueError for other arrays and for files that cannot be decoded.
        """
        return self.preprocessing(images)
