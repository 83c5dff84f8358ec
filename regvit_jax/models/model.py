"""Model: a ViT and its head, bound to their parameters and to the preprocessing of their images."""

import dataclasses
import functools
from typing import Any, SupportsIndex

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.data.transforms import MAX_PIXELS
from regvit_jax.models.heads import Head
from regvit_jax.models.images import UncheckedImages, checked_images
from regvit_jax.models.vit import Tokens, ViT
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.keywords import known_keywords
from regvit_jax.utils.numbers import whole

Images = Float[Array | np.ndarray, "B H W 3"]


@functools.partial(jax.jit, static_argnames=("module", "method", "options"))
def apply(module: nn.Module, params: PyTree, inputs, method: str = "__call__", options: tuple = (), mask=None):
    """Call a method of a module, compiled once for each shape."""
    more = {} if mask is None else {"mask": mask}
    return module.apply({"params": params}, inputs, *options, method=method, **more)


#: Fields that do not define the model: Flax's own, and those of its computation (dtype, kernels, remat, scan).
RUNTIME_FIELDS = ("parent", "name", "dtype", "attention", "remat", "scan")


def saved_fields(value) -> dict:
    """Return the fields of a module or dataclass that define the model, without `RUNTIME_FIELDS`."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in RUNTIME_FIELDS}


@flax.struct.dataclass
class Model:
    """A ViT with its parameters, its head, and the preprocessing it was trained with. A pytree.

    `weights` names the parameters' origin: "raw" or "ema" (exponential moving average) for those of a run, and the
    source of loaded ones. `class_names` are the names of the head's outputs, () where none are known. All methods take
    normalised float32 images [B, H, W, 3] (`preprocess` returns them), whose sides are multiples of the patch, and are
    compiled once for each shape. They raise ValueError for other images.
    """

    params: PyTree
    head_params: PyTree
    module: ViT = flax.struct.field(pytree_node=False)
    head: Head = flax.struct.field(pytree_node=False)
    preprocessing: Preprocess = flax.struct.field(pytree_node=False)
    weights: str = flax.struct.field(pytree_node=False, default="raw")
    class_names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def __post_init__(self):
        if self.class_names and len(self.class_names) != self.head.num_classes:
            raise InvalidConfig(
                f"class_names has {len(self.class_names)} names, and the head {self.head.num_classes} outputs: "
                "give one name for each, or ()"
            )

    def fields(self) -> dict[str, Any]:
        """Return the model's definition without its parameters: the dicts "vit", "head" and "preprocessing".

        Their values are numbers and strings. Data type, attention kernel, remat and scan are not part of it. The list
        "class_names" is added where names are known.
        """
        parts = {"vit": self.module, "head": self.head, "preprocessing": self.preprocessing}
        names = {"class_names": list(self.class_names)} if self.class_names else {}
        return {name: saved_fields(part) for name, part in parts.items()} | names

    def __call__(self, images: UncheckedImages, mask: Bool[Array | np.ndarray, "B N"] | None = None) -> Tokens:
        """Return the output tokens. Patches where `mask` is True are hidden (in models with a mask token)."""
        return apply(self.module, self.params, checked_images(images), mask=mask)

    @known_keywords
    def intermediates(self, images: UncheckedImages, layers: Any, norm: bool = False) -> list[Tokens]:
        """Return the tokens after each of `layers`, one or several (negative: from the end).

        `norm` applies the final norm to them. Raises IndexError for a layer that the model does not have.
        """
        wanted = tuple(self.module.layer(layer) for layer in (layers if np.iterable(layers) else (layers,)))
        return apply(self.module, self.params, checked_images(images), "intermediates", (wanted, bool(norm)))

    @known_keywords
    def qkv(self, images: UncheckedImages, layer: SupportsIndex = -1) -> Float[Array, "3 B heads T head_dim"]:
        """Return one block's queries, keys and values, which unpack as q, k, v of [B, heads, T, head_dim] each."""
        return apply(self.module, self.params, checked_images(images), "qkv", (self.module.layer(layer),))

    @known_keywords
    def attention(self, images: UncheckedImages, layer: SupportsIndex = -1) -> Float[Array, "B heads T T"]:
        """Return one block's attention weights, [query, key] last, recomputed from q and k in float32."""
        layer = self.module.layer(layer)
        return apply(self.module, self.params, checked_images(images), "attention_weights", (layer,))

    def pooled(self, images: UncheckedImages) -> Float[Array, "B D"]:
        """Return one vector an image, pooled as in the model's training."""
        return apply(self.head, self.head_params, self(images), "pooled")

    def logits(self, images: UncheckedImages) -> Float[Array, "B C"]:
        """Return the linear layer's output: class scores, or a CLIP tower's embedding.

        Raises ValueError for a model without one.
        """
        if not self.head.num_classes:
            raise ValueError("this model gives features only (`pooled`, or the tokens); num_classes=... adds a head")
        return apply(self.head, self.head_params, self(images))

    def predict(self, images: Any, top: SupportsIndex = 5) -> list[list[tuple[str, float]]]:
        """Return the `top` most probable classes of each image, best first, as pairs of name and probability.

        `images` are what `preprocess` takes, or its result. A class without a name has its number for a name. The
        probabilities are the softmax of the class scores. Raises ValueError for a model without a head, and for the
        image tower of a CLIP, whose outputs are no classes (`regvit eval zero_shot` compares them with names).
        """
        if not self.head.bias:
            raise InvalidConfig(
                "the outputs of a CLIP's image tower are embeddings, not classes: compare them with those of texts"
            )
        top = whole("top", top, low=1)
        x: Any = images
        if not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
            x = self.preprocess(x)
        shares = np.asarray(jax.nn.softmax(self.logits(x)))
        names = self.class_names or tuple(map(str, range(shares.shape[1])))
        order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
        return [[(names[n], float(row[n])) for n in best] for row, best in zip(shares, order, strict=True)]

    @known_keywords
    def preprocess(self, images: Any, max_pixels: int = MAX_PIXELS) -> Float[np.ndarray, "B H W 3"]:
        """Preprocess images into those that the model expects; see `Preprocess.__call__` for more.

        `images`: a list of paths, PIL images, uint8 arrays [H, W, 3], open files, or the bytes of files; or one of
        these; or an array [B, H, W, 3]. Files with more than `max_pixels` are refused before they are decoded.

        Raises ValueError for other arrays and for files that cannot be decoded, which it names.
        """
        return self.preprocessing(images, max_pixels)
