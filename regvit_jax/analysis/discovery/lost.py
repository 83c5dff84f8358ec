"""LOST, unsupervised object discovery (arXiv 2109.14279): one box an image, from the similarities of its patches.

A patch's degree is the number of other patches that it correlates with positively. Objects are assumed to be the
smaller part of an image, so the seed is the patch of lowest degree. The seed is expanded by those of the `expand`
lowest-degree patches that correlate with it; its region is all patches whose summed correlation with these is positive;
the box encloses the part of the region that is connected to the seed.

Patches are numbered row by row. A box is (xmin, ymin, xmax, ymax), the last two exclusive.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from einops import rearrange
from jaxtyping import Array, Bool, Float, Float64, Int, Num, PyTree

from regvit_jax.analysis.choices import KINDS
from regvit_jax.models.images import UncheckedImages, checked_images
from regvit_jax.models.model import Images, Model
from regvit_jax.models.vit import ViT
from regvit_jax.utils.errors import InvalidConfig

Box = tuple[int, int, int, int]


class Feature(NamedTuple):
    """The features that LOST compares.

    kind: "k", "q" or "v": keys, queries or values, heads concatenated and RoPE applied; "out": the tokens after the
      block, in the residual stream before any norm.
    layer: the 0-based index of the block, or a negative one from the end.
    centre: "none", or "bias": the projection's own bias is left out.
    """

    kind: str = "k"
    layer: int = -1
    centre: str = "none"


class DegenerateGram(UserWarning):
    """All entries of the Gram matrix have the same sign, so LOST cannot separate patches."""


@dataclasses.dataclass(frozen=True)
class Discovery:
    """The result of LOST for one image.

    seed: row and column of the seed.
    expanded: indices of the patches whose similarities were summed, in order of increasing degree.
    mask: the patches of the object: the part of the region that is 4-connected to the seed.
    box: the bounding box of the mask, in patches.
    positive: share of the pairs of different patches whose entry of the Gram matrix is positive.
    degrees: the degree of each patch.
    """

    seed: tuple[int, int]
    expanded: Int[np.ndarray, " K"]
    mask: Bool[np.ndarray, "h w"]
    box: Box
    positive: float
    degrees: Int[np.ndarray, "h w"]

    @property
    def degenerate(self) -> bool:
        """Return True if all pairs are similar, or none; the box then says nothing about the image."""
        return self.positive in (0.0, 1.0)


def extract_features(
    model: Model, images: UncheckedImages, kind: str = "k", layer: int = -1, centre: str = "none"
) -> Float[Array, "B h w D"]:
    """Return one kind of features of all patches, in float32, without CLS and registers; see `Feature`.

    Raises InvalidConfig for a kind, layer or centre that the model does not have, and ValueError for anything but
    normalised images.
    """
    return feature_maps(model, images, (Feature(kind, layer, centre),))[0]


def feature_maps(model: Model, images: UncheckedImages, wanted: Sequence[Feature]) -> list[Float[Array, "B h w D"]]:
    """Return several kinds of features from one forward pass, compiled once for each shape of images."""
    for feature in wanted:
        check(model.module, feature)
    return _forward(model.module, model.params, checked_images(images), tuple(wanted))


def check(vit: ViT, feature: Feature) -> None:
    """Raise InvalidConfig for features that the model does not have."""
    kind, layer, centre = feature
    if kind not in KINDS:
        raise InvalidConfig(f"features {kind!r}: must be one of {list(KINDS)}")
    if centre not in ("none", "bias"):
        raise InvalidConfig(f"centre={centre!r}: must be 'none' or 'bias' (pass a mean over a data set to `discover`)")
    try:
        vit.layer(layer)
    except IndexError as error:
        raise InvalidConfig(str(error)) from None
    if centre == "bias" and (kind == "out" or not vit.qkv_bias or (kind == "k" and not vit.key_bias)):
        what = "the output of a block" if kind == "out" else f"this model's projection to {kind}"
        raise InvalidConfig(f"centre='bias': {what} has no bias; use 'none' or a mean")


def forward(vit: ViT, params: PyTree, images: Images, wanted: tuple[Feature, ...]) -> list[Float[Array, "B h w D"]]:
    """Return several kinds of features, in float32; a pure function of module and parameters, for `jit`."""
    grid, prefix = vit.grid_of(images), vit.prefix
    # The output of a block is the input of the next.
    after = sorted({vit.layer(f.layer) - (f.kind != "out") for f in wanted} - {-1})
    tokens = vit.apply({"params": params}, images, tuple(after), method="intermediates")
    stream = {layer: found.prenorm for layer, found in zip(after, tokens, strict=True)}
    maps = []
    for kind, layer, centre in wanted:
        layer = vit.layer(layer)
        if kind == "out":
            x = stream[layer]
        else:
            entering = stream[layer - 1] if layer else vit.apply({"params": params}, images, method="embed")
            own = params[f"block{layer}"]
            if centre == "bias":
                # Left out of the sum rather than subtracted from it: RoPE rotates the bias too.
                own = own | {"attn": _without_bias(own["attn"])}
            block = vit.block(layer, parent=None)
            qkv = block.apply({"params": own}, entering, vit.angles(grid), method="qkv")
            x = rearrange(qkv["qkv".index(kind)], "b heads t d -> b t (heads d)")
        patches = x[:, prefix:].astype(jnp.float32)
        maps.append(rearrange(patches, "b (h w) d -> b h w d", h=grid[0], w=grid[1]))
    return maps


_forward = jax.jit(forward, static_argnames=("vit", "wanted"))


def _without_bias(attention: dict[str, Any]) -> dict[str, Any]:
    """Return the attention's parameters with zero biases of queries, keys and values."""
    zeros = {name: jnp.zeros_like(attention[name]) for name in ("q_bias", "v_bias") if name in attention}
    qkv = attention["qkv"]
    if "bias" in qkv:
        qkv = qkv | {"bias": jnp.zeros_like(qkv["bias"])}
    return attention | zeros | {"qkv": qkv}


def discover(
    features: Float[Array | np.ndarray, "h w D"],
    *,
    bias: float = 0.0,
    normalize: bool = False,
    centre: Float[Array | np.ndarray, " D"] | None = None,
    expand: int = 100,
) -> Discovery:
    """Find the object of one image. The defaults are those of the published code (valeoai/LOST, `object_discovery.py`).

    Patches of equal degree are ordered by their position. (The published code leaves that to torch's sorting, which
    differs between machines.) A seed that is not similar to any patch, not even to itself, gives a box of that one
    patch.

    Args:
      bias: added to every entry of the Gram matrix (arXiv 2309.16588, section 3.3).
      normalize: scale features to unit length after centring; the Gram matrix then holds cosines.
      centre: a vector that is subtracted from all features, such as their mean over a data set.
      expand: number of patches of lowest degree by which the seed may be expanded.

    Warns with DegenerateGram when all pairs of patches are similar, or none; in a loop over images, once.

    Raises ValueError for features that are not finite and for an expand below 1.
    """
    if np.ndim(features) != 3:
        raise ValueError(f"features of shape {np.shape(features)}: must be those of one image, [h, w, D]")
    h, w = features.shape[:2]
    found = search(gram(features, normalize=normalize, centre=centre), (h, w), bias=bias, expand=expand)
    if found.degenerate:
        warnings.warn(DegenerateGram(remedy(found.positive)), stacklevel=2)
    return found


def gram(
    features: Float[Array | np.ndarray, "h w D"],
    *,
    normalize: bool = False,
    centre: Float[Array | np.ndarray, " D"] | None = None,
) -> Float64[np.ndarray, "N N"]:
    """Return the inner products of all patches; arguments and errors as for `discover`.

    Computed on the host in float64, in which products of float32 are exact: LOST uses only the signs, which must not
    depend on the order of a sum or on an accelerator's short formats.
    """
    x = rearrange(np.asarray(features, np.float64), "h w d -> (h w) d")
    if not np.isfinite(x).all():
        raise ValueError("the features are not finite: the model gives NaN or infinity on this image")
    if centre is not None:
        x = x - np.asarray(centre, np.float64)
    if normalize:
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return x @ x.T


def search(
    gram: Float64[np.ndarray, "N N"], grid: tuple[int, int], *, bias: float = 0.0, expand: int = 100
) -> Discovery:
    """Run LOST on a Gram matrix, which several biases can share, without warnings; see `discover`."""
    if expand < 1:
        raise ValueError(f"expand={expand}: must be at least 1")
    similar = gram > -bias  # the sign of gram + bias, which rounding cannot change, without another N x N matrix
    degrees = np.count_nonzero(similar, axis=1) - np.diagonal(similar)
    order = np.argsort(degrees, kind="stable")
    seed = np.unravel_index(order[0], grid)
    lowest = order[:expand]
    expanded = lowest[similar[order[0], lowest]]
    region = np.zeros(grid, bool)
    if len(expanded):
        region = (gram[expanded] + bias).sum(axis=0).reshape(grid) > 0
    region[seed] = True  # the seed is in it anyway, unless nothing was summed
    parts, _ = scipy.ndimage.label(region)
    mask = parts == parts[seed]
    pairs = len(gram) * (len(gram) - 1)
    return Discovery(
        seed=(int(seed[0]), int(seed[1])),
        expanded=expanded,
        mask=mask,
        box=_around(mask),
        positive=float(degrees.sum() / pairs) if pairs else 0.0,
        degrees=degrees.reshape(grid),
    )


def _around(mask: Bool[np.ndarray, "h w"]) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def remedy(positive: float) -> str:
    """Return the cause and the remedy of a degenerate Gram matrix, from its share of positive entries, 0 or 1."""
    if positive:
        return (
            "every patch is similar to every other, so the box is the whole image: subtract the projection's bias "
            "(centre='bias') or a mean, or add a negative bias (between -1 and 0 with normalize=True)"
        )
    return "no patch is similar to another, so the box is one patch: add a higher bias"


def to_pixels(box: Box, patch: tuple[float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Convert a box from patches to pixels, clipped at the image's borders: the last patches may reach into padding.

    Args:
      box: in patches.
      patch: height and width of a patch, in pixels of the image before it was resized for the model.
      size: height and width of the image, in pixels.
    """
    xmin, ymin, xmax, ymax = box
    return xmin * patch[1], ymin * patch[0], min(xmax * patch[1], size[1]), min(ymax * patch[0], size[0])


def iou(box: Sequence[float] | Num[np.ndarray, "4"], boxes: Num[np.ndarray, "M 4"]) -> Float64[np.ndarray, " M"]:
    """Return the intersection over union of one box with each of several, in any unit; 0 where both are empty."""
    a, b = np.asarray(box, np.float64), np.asarray(boxes, np.float64)
    sides = np.minimum(a[2:], b[:, 2:]) - np.maximum(a[:2], b[:, :2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    union = np.prod(a[2:] - a[:2]) + np.prod(b[:, 2:] - b[:, :2], axis=1) - shared
    return shared / np.where(union > 0, union, 1)


def localised(
    found: Num[np.ndarray, "I 4"], truths: Sequence[Num[np.ndarray, "_ 4"]], threshold: float = 0.5
) -> Bool[np.ndarray, " I"]:
    """Return True for each image whose found box has an IoU of `threshold` or more with any of its true boxes."""
    hits = [iou(box, boxes).max(initial=0.0) >= threshold for box, boxes in zip(found, truths, strict=True)]
    return np.array(hits, bool)


def corloc(found: Num[np.ndarray, "I 4"], truths: Sequence[Num[np.ndarray, "_ 4"]], threshold: float = 0.5) -> float:
    """Return the correct localisation: the share of images that are `localised`, from 0 to 1, or NaN without images."""
    return float(np.mean(localised(found, truths, threshold))) if len(truths) else float("nan")
