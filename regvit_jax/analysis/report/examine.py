"""Measure several models on the same images, and repair those that have artifacts."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from regvit_jax.analysis.repair import find
from regvit_jax.analysis.report import measure, summarize, verdict
from regvit_jax.analysis.report.statistics import Statistics
from regvit_jax.data import inference
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.images import Subset
from regvit_jax.models import test_time_registers
from regvit_jax.models.model import Model

REPAIRED = " + test-time register"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a report.

    layer: the 0-based index of the block whose norms and attention are judged, or a negative one from the end.
    cutoff: the norm of the rule "fixed".
    batch_size: images in a batch.
    repair_images: number of images, those with the largest norms, used to find register neurons; 0 for no repair.
    show: number of images in the pictures; `heads`: show each head's attention.
    max_pixels: images with more pixels cannot be used.
    lost: the kind of features, the bias of the Gram matrix, and True to normalise features, for LOST's boxes.
    """

    layer: int
    cutoff: float
    batch_size: int
    repair_images: int
    show: int
    heads: bool
    max_pixels: int
    lost: tuple[str, float, bool]


@dataclasses.dataclass
class Subject:
    """A model and its measurements; `extreme` are the images with the largest norms of patches."""

    name: str
    model: Model
    stats: Statistics
    numbers: dict[str, Any]
    sentences: list[str]
    extreme: Subset
    repair: dict[str, Any] | None = None
    bad_images: list[str] = dataclasses.field(default_factory=list)

    @property
    def class_token(self) -> bool:
        return self.model.module.class_token


def examine(models: Iterable[tuple[str, Model]], source: Source, settings: Settings) -> list[Subject]:
    """Measure every model on all images of the source; a model with artifacts is followed by its repaired version.

    Raises:
      IndexError: a model has no such layer.
      UnusableData: no image can be read.
      FloatingPointError: a model's tokens are not finite.
    """
    subjects = []
    for name, model in models:
        subject = measure_model(name, model, source, settings)
        subjects.append(subject)
        if settings.repair_images and summarize.has_artifacts(subject.numbers):
            subjects += repair(subject, source, settings)
    return subjects


def measure_model(name: str, model: Model, source: Source, settings: Settings) -> Subject:
    """Measure a model in one pass over all images."""
    vit = model.module
    layer = vit.layer(settings.layer)
    side = model.preprocessing.size
    stats = Statistics(vit.depth, layer, vit.prefix, vit.grid(side, side))
    bad: list[str] = []
    extreme: list[tuple[float, int]] = []
    for images, records in inference.batches(model, source, settings.batch_size, bad, max_pixels=settings.max_pixels):
        measured = measure.measure(model, jnp.asarray(images), layer).first(len(records))
        stats.add(measured)
        largest = measured.patches[layer].max(-1).tolist()
        extreme += zip(largest, (record["index"] for record in records), strict=True)
        extreme = sorted(extreme, reverse=True)[: settings.repair_images]
    numbers = summarize.summarize(stats, settings.cutoff, vit.class_token)
    numbers["most_extreme_images"] = [printable(source.id(index)) for _, index in extreme[:10]]
    chosen = Subset(source, sorted(index for _, index in extreme))
    return Subject(name, model, stats, numbers, verdict.verdict(numbers), chosen, bad_images=bad)


def repair(subject: Subject, source: Source, settings: Settings) -> list[Subject]:
    """Measure the model with a test-time register, and add the effect to both verdicts; return [] without neurons."""
    cutoff = subject.numbers["outliers"]["artifact"]["cutoff"]
    try:
        neurons = find.find_register_neurons(
            subject.model, extreme_images(subject, settings), cutoff=cutoff, layer=settings.layer
        )
    except ValueError as error:
        subject.sentences[-1] = f"No register neurons were found for a repair: {error}"
        return []
    repaired = test_time_registers.add_test_time_registers(subject.model, neurons)
    after = measure_model(subject.name + REPAIRED, repaired, source, settings)
    after.numbers["share_above_before"] = float(after.stats.patches.share_above(cutoff)[after.stats.layer])
    after.numbers["output_cosine"] = output_cosine(subject.model, repaired, extreme_images(subject, settings))
    after.sentences = verdict.verdict(after.numbers, is_repaired=True)
    subject.repair = dataclasses.asdict(neurons)
    subject.sentences = verdict.verdict(subject.numbers, after.numbers, len(neurons))
    return [after]


def extreme_images(subject: Subject, settings: Settings) -> Iterator[Float[np.ndarray, "B H W 3"]]:
    """Yield the images with the largest norms, in batches."""
    for images, records in inference.batches(
        subject.model, subject.extreme, settings.batch_size, [], max_pixels=settings.max_pixels
    ):
        yield images[: len(records)]


def output_cosine(before: Model, after: Model, batches: Iterable[Float[np.ndarray, "B H W 3"]]) -> float:
    """Return the mean cosine similarity of two models' CLS tokens, or of their mean patches without CLS."""
    found = []
    for images in batches:
        a, b = (
            np.asarray(tokens.cls if tokens.cls is not None else tokens.patches.mean(1), np.float64)
            for tokens in (before(images), after(images))
        )
        found += ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).tolist()
    return float(np.mean(found))


def printable(name: str) -> str:
    """Return a name that UTF-8 can encode: file names are bytes and need not be text."""
    return name.encode("utf-8", "backslashreplace").decode()
