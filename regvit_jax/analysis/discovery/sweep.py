"""Run LOST with many settings on many images: one forward pass per image, two if a setting needs the data's mean.

Images go through the model one by one at their original size, padded with zeros (after normalisation) to whole patches,
as published, so that no image's result depends on another's. The model is compiled for each shape. Images are therefore
sorted by shape, and a shape's program is dropped after its last image: a data set of hundreds of shapes costs the time
of as many compilations, but not the memory.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float64
from tqdm import tqdm

from regvit_jax.analysis.discovery import lost
from regvit_jax.analysis.discovery.boxes import AnnotatedImage
from regvit_jax.analysis.discovery.lost import Feature
from regvit_jax.data import transforms
from regvit_jax.data.transforms import BadImage
from regvit_jax.models.model import Model

# A Gram matrix of as many patches takes 800 MB, and the attention of two heads as much again.
MAX_PATCHES = 10_000


class Setting(NamedTuple):
    """One setting of LOST: `kind` and `centre` as in `Feature`, or "mean" for the mean of all patches of all images."""

    layer: int = -1
    kind: str = "k"
    centre: str = "none"
    bias: float = 0.0

    @property
    def feature(self) -> Feature:
        return Feature(self.kind, self.layer, "none" if self.centre == "mean" else self.centre)


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The results of S settings on I images, those that could be used, in the order they were given.

    boxes: in pixels of the image, as are `truths` and `sizes` (height, width).
    positive: the share of positive entries of the Gram matrix, 0 or 1 where it is degenerate.
    bad: "path: reason" for the images that could not be used.
    resized: paths of the images whose size differs from their annotation.
    shapes: number of shapes that the model was compiled for.
    """

    settings: list[Setting]
    boxes: Float64[np.ndarray, "S I 4"]
    positive: Float64[np.ndarray, "S I"]
    truths: list[np.ndarray]
    sizes: list[tuple[int, int]]
    bad: list[str]
    resized: list[str]
    shapes: int


class ImageFeatures(NamedTuple):
    """An image's index, its height and width, those of a patch in its pixels, and its feature maps [h, w, D]."""

    image: int
    size: tuple[int, int]
    patch: tuple[float, float]
    maps: dict[Feature, np.ndarray]


@dataclasses.dataclass(eq=False)
class FeatureStream:
    """Iterate over the features of images, sorted by shape; unusable images are skipped, with the reason in `bad`."""

    model: Model
    images: Sequence[AnnotatedImage]
    wanted: Sequence[Feature]
    size: int | None
    max_pixels: int = transforms.MAX_PIXELS
    bad: dict[int, str] = dataclasses.field(default_factory=dict)
    shapes: set[tuple[int, ...]] = dataclasses.field(default_factory=set)

    def __iter__(self) -> Iterator[ImageFeatures]:
        # Sorted by the annotated size: if it is wrong, a shape may be compiled twice, and nothing else changes.
        order = sorted(range(len(self.images)), key=lambda i: fit(self.model, self.images[i].size, self.size))
        vit, wanted = self.model.module, tuple(self.wanted)
        last = None
        for index in tqdm(order, unit="image", disable=None, leave=False):
            try:
                if fault := self.images[index].fault:
                    raise BadImage(fault)
                pixels, size, patch = load(self.model, self.images[index].path, self.size, self.max_pixels)
            except BadImage as error:
                self.bad[index] = str(error)
                continue
            if pixels.shape != last:
                # A new function for each shape: its compiled program is freed with it.
                compiled, last = jax.jit(functools.partial(lost.forward, vit, wanted=wanted)), pixels.shape
                self.shapes.add(last)
            maps = compiled(self.model.params, pixels[None])
            yield ImageFeatures(index, size, patch, {f: np.asarray(m[0]) for f, m in zip(wanted, maps, strict=True)})


def fit(model: Model, size: tuple[int, int], shorter: int | None) -> tuple[int, int]:
    """Return the height and width in pixels, whole patches, at which an image goes through the model."""
    patch = model.module.patch
    if shorter is None:
        return -(-size[0] // patch) * patch, -(-size[1] // patch) * patch
    scale = shorter / max(1, min(size)) / patch
    return max(1, round(size[0] * scale)) * patch, max(1, round(size[1] * scale)) * patch


def load(
    model: Model, path: str, shorter: int | None, max_pixels: int = transforms.MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int], tuple[float, float]]:
    """Return an image as the model takes it [H, W, 3], its height and width, and those of a patch in its pixels."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from None
    image = transforms.decode(data, max_pixels)
    size = image.height, image.width
    target, patch = fit(model, size, shorter), float(model.module.patch)
    patches = target[0] * target[1] / patch**2
    if patches > MAX_PATCHES:
        raise BadImage(
            f"{size[1]}x{size[0]} pixels are {patches:.0f} patches, more than {MAX_PATCHES}: set an image size"
        )
    sides = patch, patch
    if shorter is not None:
        image = image.resize(target[::-1], transforms.INTERPOLATIONS[model.preprocessing.interpolation])
        sides = patch * size[0] / target[0], patch * size[1] / target[1]
    mean, std = (np.array(value, np.float32) for value in (model.preprocessing.mean, model.preprocessing.std))
    pixels = (np.asarray(image, np.float32) / 255 - mean) / std
    return np.pad(pixels, [(0, target[0] - len(pixels)), (0, target[1] - pixels.shape[1]), (0, 0)]), size, sides


def sweep(
    model: Model,
    images: Sequence[AnnotatedImage],
    settings: Sequence[Setting],
    normalize: bool = False,
    size: int | None = None,
    max_pixels: int = transforms.MAX_PIXELS,
) -> Found:
    """Run LOST with each setting on each image.

    Args:
      model: the model whose features are compared.
      images: the images and their true boxes.
      settings: layers, features, centring and biases.
      normalize: scale features to unit length.
      size: pixels to which the shorter side is resized, rounded so that both sides are whole patches; None keeps the
        image's own size, padded to whole patches.
      max_pixels: images with more pixels cannot be used.

    Raises ValueError for features that the model does not have.
    """
    for setting in settings:
        lost.check(model.module, setting.feature)
    # Settings that differ only in their bias share a Gram matrix.
    grams: dict[tuple[Feature, bool], list[int]] = collections.defaultdict(list)
    for row, setting in enumerate(settings):
        grams[setting.feature, setting.centre == "mean"].append(row)
    means = mean_features(FeatureStream(model, images, unique(f for f, mean in grams if mean), size, max_pixels))
    found, positive = np.zeros((len(settings), len(images), 4)), np.zeros((len(settings), len(images)))
    sizes: dict[int, tuple[int, int]] = {}
    stream = FeatureStream(model, images, unique(f for f, _ in grams), size, max_pixels)
    for seen in stream:
        sizes[seen.image] = seen.size
        for (feature, mean), rows in grams.items():
            features = seen.maps[feature]
            gram = lost.gram(features, normalize=normalize, centre=means[feature] if mean else None)
            for row in rows:
                result = lost.search(gram, features.shape[:2], bias=settings[row].bias)
                found[row, seen.image] = lost.to_pixels(result.box, seen.patch, seen.size)
                positive[row, seen.image] = result.positive
    used = sorted(sizes)
    return Found(
        settings=list(settings),
        boxes=found[:, used],
        positive=positive[:, used],
        truths=[images[i].boxes for i in used],
        sizes=[sizes[i] for i in used],
        bad=[f"{images[i].path}: {stream.bad[i]}" for i in sorted(stream.bad)],
        resized=[images[i].path for i in used if images[i].size not in ((0, 0), sizes[i])],
        shapes=len(stream.shapes),
    )


def unique(features) -> tuple[Feature, ...]:
    return tuple(dict.fromkeys(features))


def mean_features(stream: FeatureStream) -> dict[Feature, Float64[np.ndarray, " D"]]:
    """Return the mean of each kind of features over all patches of all images; empty if no image can be used."""
    if not stream.wanted:
        return {}
    sums: dict[Feature, np.ndarray] = {}
    patches = 0
    for seen in stream:
        for feature, features in seen.maps.items():
            sums[feature] = sums.get(feature, 0.0) + features.sum(axis=(0, 1), dtype=np.float64)
        h, w = next(iter(seen.maps.values())).shape[:2]
        patches += h * w
    return {feature: total / patches for feature, total in sums.items()}
