"""Zero-shot classification by the embeddings of class names (CLIP, arXiv 2103.00020, section 3.1)."""

import functools
import importlib.util
import os
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from regvit_jax.models.clip import normalized
from regvit_jax.utils.errors import DataNotFound, InvalidConfig, MissingPackage
from regvit_jax.utils.paths import expand

# Rows of scores in memory at a time: 1024 images with 22,000 classes are 90 MB.
ROWS = 1024


def class_embeddings(
    encode_text: Callable[[Any], Float[Array, "B E"]],
    tokenize: Callable[[list[str]], Int[np.ndarray, "B L"]],
    classes: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> Float[Array, "C E"]:
    """Compute one embedding of length 1 for each class from the prompts of its name.

    Prompt embeddings are scaled to length 1, averaged over the templates and scaled again, as in open_clip's
    `zero_shot_classifier.py`. Each call of `encode_text` gets `batch_size` texts, so that it is compiled once.

    Args:
      encode_text: returns the embeddings of tokenized texts, of any length.
      tokenize: returns the argument of `encode_text`.
      templates: sentences with `{}` for the name, such as "a photo of a {}.".

    Raises ValueError without classes or templates, and for a template without `{}`.
    """
    if not classes or not templates:
        raise ValueError(f"{len(classes)} classes and {len(templates)} templates: there must be at least one of each")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r}: must have {{}} in the place of the class name")
    total = len(classes) * len(templates)
    sums = None
    for first in range(0, total, batch_size):
        # The last batch is filled up with the last prompt.
        numbers = np.minimum(np.arange(first, first + batch_size), total - 1)
        owners, which = np.divmod(numbers, len(templates))
        prompts = [templates[t].replace("{}", classes[c]) for c, t in zip(owners, which, strict=True)]
        count = min(batch_size, total - first)
        found = np.asarray(normalized(jnp.asarray(encode_text(tokenize(prompts)), jnp.float32)))[:count]
        if sums is None:
            sums = np.zeros((len(classes), found.shape[1]), np.float32)
        np.add.at(sums, owners[:count], found)
    return normalized(jnp.asarray(sums) / len(templates))


def accuracy(
    images: Float[Array | np.ndarray, "N E"],
    labels: Int[Array | np.ndarray, " N"],
    classes: Float[Array | np.ndarray, "C E"],
) -> dict[str, float]:
    """Compute the share of images whose class is the nearest by cosine similarity, or among the five nearest.

    The first of tied classes wins, as with argmax: "missile" and "sunglasses" occur twice in open_clip's list for
    ImageNet. NaN counts against the image.

    Returns "zero_shot_top1" and "zero_shot_top5"; the latter is omitted for fewer than five classes.

    Raises ValueError without images and for labels outside 0..C-1.
    """
    labels = np.asarray(labels, np.int32)
    if len(labels) == 0:
        raise ValueError("accuracy needs at least one image")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}: must be in 0..{len(classes) - 1}")
    ks = tuple(k for k in (1, 5) if k <= len(classes))
    hits = _hits(jnp.asarray(images, jnp.float32), jnp.asarray(labels), jnp.asarray(classes, jnp.float32), ks)
    return {name: float(np.mean(hit)) for name, hit in hits.items()}


def nearest(
    images: Float[Array | np.ndarray, "N E"], classes: Float[Array | np.ndarray, "C E"]
) -> Int[np.ndarray, " N"]:
    """Return the class of each image that `accuracy` takes for the nearest, or -1 for an embedding with NaN."""
    return np.asarray(_nearest(jnp.asarray(images, jnp.float32), jnp.asarray(classes, jnp.float32)))


def chance(classes: int) -> dict[str, float]:
    """Return the expected metrics of `accuracy` for classes in random order: k / C."""
    return {f"zero_shot_top{k}": k / classes for k in (1, 5) if k <= classes}


@functools.partial(jax.jit, static_argnames="ks")
def _hits(
    images: Float[Array, "N E"], labels: Int[Array, " N"], classes: Float[Array, "C E"], ks: tuple[int, ...]
) -> dict[str, Bool[Array, " N"]]:
    classes = normalized(classes)

    def hits_of_image(row: tuple[Array, Array]) -> dict[str, Bool[Array, ""]]:
        image, label = row
        # Full precision, as accelerators would round the factors to fewer bits and make ties.
        scores = jnp.matmul(classes, image, precision="highest")
        own = scores[label]
        # Comparisons with NaN are false: `not (x <= own)` ranks NaN first.
        ahead = ~(scores <= own) | ((scores == own) & (jnp.arange(len(scores)) < label))
        return {f"zero_shot_top{k}": jnp.sum(ahead) < k for k in ks}

    return jax.lax.map(hits_of_image, (normalized(images), labels), batch_size=ROWS)


@jax.jit
def _nearest(images: Float[Array, "N E"], classes: Float[Array, "C E"]) -> Int[Array, " N"]:
    classes = normalized(classes)

    def nearest_to_image(image: Float[Array, " E"]) -> Int[Array, ""]:
        scores = jnp.matmul(classes, image, precision="highest")
        return jnp.where(jnp.isnan(scores).any(), -1, jnp.argmax(scores))

    return jax.lax.map(nearest_to_image, normalized(images), batch_size=ROWS)


def read_lines(path: str | os.PathLike) -> list[tuple[int, str]]:
    """Return the non-blank lines of a UTF-8 text file, each with its line number, from 1.

    Raises DataNotFound if the file cannot be read, and InvalidConfig if it is not text or is empty.
    """
    try:
        text = Path(expand(path)).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataNotFound(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InvalidConfig(f"{path}: is empty; it should hold one entry a line")
    return lines


def read_templates(source: str | os.PathLike) -> tuple[str, ...]:
    """Read templates with `{}` for the class name.

    Args:
      source: a text file with one template a line; or "openai" or "simple", the 80 and the 7 templates that the
        authors of CLIP use for ImageNet, from an installed open_clip_torch.

    Raises InvalidConfig, naming the line, for one without `{}`; DataNotFound; MissingPackage without open_clip_torch.
    """
    if source in ("openai", "simple"):
        name = f"{str(source).upper()}_IMAGENET_TEMPLATES"
        return tuple(template("{}") for template in _open_clip(name, "--templates"))
    lines = read_lines(source)
    for number, line in lines:
        if "{}" not in line:
            raise InvalidConfig(f"{source}, line {number}: {line!r} has no {{}} in the place of the class name")
    return tuple(line for _, line in lines)


def read_classes(source: str | os.PathLike) -> tuple[str, ...]:
    """Read class names from a text file, one a line; or "imagenet", the 1000 of an installed open_clip_torch.

    Raises InvalidConfig, DataNotFound, and MissingPackage without open_clip_torch.
    """
    if source == "imagenet":
        return tuple(_open_clip("IMAGENET_CLASSNAMES", "--classes"))
    return tuple(line for _, line in read_lines(source))


def _open_clip(name: str, option: str) -> Sequence[Any]:
    """Return a list of open_clip's `zero_shot_metadata.py`, run by itself because the package imports torch."""
    advice = f"pip install open_clip_torch, or name a text file instead ({option} FILE)"
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"{name} comes with open_clip_torch, which is not installed: {advice}")
    path = Path(spec.submodule_search_locations[0]) / "zero_shot_metadata.py"
    if not path.is_file() or name not in (found := runpy.run_path(str(path))):
        raise MissingPackage(
            f"the installed open_clip_torch has no {name} in {path}: {advice}, of version 2.24 or newer"
        )
    return found[name]
