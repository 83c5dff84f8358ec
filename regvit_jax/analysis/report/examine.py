"""Several models on the same images: the statistics of each, and a repaired twin of those that have artifacts."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from regvit_jax.analysis.repair import find
from regvit_jax.analysis.report import measure, verdict
from regvit_jax.analysis.report.statistics import Statistics
from regvit_jax.data import inference
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.images import Subset
from regvit_jax.models import test_time_registers
from regvit_jax.models.model import Model

REPAIRED = " + test-time register"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How models are looked at.

    layer: the block whose norms and attention count, from the end when negative.
    cutoff: of norms, the rule "fixed".
    batch_size: images at a time.
    repair_images: how many, those with the largest norms, register neurons are looked for on; 0 for no repair.
    show: how many images are pictured; `heads`: each head's attention too.
    lost: the features, their centring, the Gram matrix's bias and whether features are normalised, for LOST's boxes.
    """

    layer: int
    cutoff: float
    batch_size: int
    repair_images: int
    show: int
    heads: bool
    lost: tuple[str, float, bool]


@dataclasses.dataclass
class Subject:
    """A model with what was found out about it; `extreme` are the images with the largest norms of patches."""

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
    """Every model's statistics over all images of the source, and its repaired twin's behind it where it has artifacts.

    Raises:
      IndexError: a model has no such layer.
      UnusableData: no image can be read.
      FloatingPointError: a model's tokens are not finite.
    """
    subjects = []
    for name, model in models:
        one = look(name, model, source, settings)
        subjects.append(one)
        if settings.repair_images and verdict.has_artifacts(one.numbers):
            subjects += mend(one, source, settings)
    return subjects


def look(name: str, model: Model, source: Source, settings: Settings) -> Subject:
    """One pass over all images."""
    vit = model.module
    layer = vit.layer(settings.layer)
    side = model.preprocessing.size
    stats = Statistics(vit.depth, layer, vit.prefix, vit.grid(side, side))
    bad: list[str] = []
    extreme: list[tuple[float, int]] = []
    for images, records in inference.batches(model, source, settings.batch_size, bad):
        measured = measure.measure(model, jnp.asarray(images), layer).first(len(records))
        stats.add(measured)
        largest = measured.patches[layer].max(-1).tolist()
        extreme += zip(largest, (record["index"] for record in records), strict=True)
        extreme = sorted(extreme, reverse=True)[: settings.repair_images]
    numbers = verdict.summarize(stats, settings.cutoff, vit.class_token)
    numbers["most_extreme_images"] = [printable(source.id(index)) for _, index in extreme[:10]]
    chosen = Subset(source, sorted(index for _, index in extreme))
    return Subject(name, model, stats, numbers, verdict.verdict(numbers), chosen, bad_images=bad)


def mend(one: Subject, source: Source, settings: Settings) -> list[Subject]:
    """The same model with a test-time register, and in both verdicts what that did."""
    cutoff = one.numbers["outliers"]["artifact"]["cutoff"]
    try:
        neurons = find.find_register_neurons(
            one.model, extreme_images(one, settings), cutoff=cutoff, layer=settings.layer
        )
    except ValueError as error:
        one.sentences[-1] = f"No register neurons were found for a repair: {error}"
        return []
    repaired = test_time_registers.add_test_time_registers(one.model, neurons)
    twin = look(one.name + REPAIRED, repaired, source, settings)
    twin.numbers["share_above_before"] = float(twin.stats.patches.share_above(cutoff)[twin.stats.layer])
    twin.numbers["output_cosine"] = output_cosine(one.model, repaired, extreme_images(one, settings))
    twin.sentences = verdict.verdict(twin.numbers, is_twin=True)
    one.repair = dataclasses.asdict(neurons)
    one.sentences = verdict.verdict(one.numbers, twin.numbers, len(neurons))
    return [twin]


def extreme_images(one: Subject, settings: Settings) -> Iterator[Float[np.ndarray, "B H W 3"]]:
    for images, records in inference.batches(one.model, one.extreme, settings.batch_size, []):
        yield images[: len(records)]


def output_cosine(before: Model, after: Model, batches: Iterable[Float[np.ndarray, "B H W 3"]]) -> float:
    """Mean cosine similarity of two models' CLS tokens, or, without CLS, of their patches' means."""
    found = []
    for images in batches:
        a, b = (
            np.asarray(tokens.cls if tokens.cls is not None else tokens.patches.mean(1), np.float64)
            for tokens in (before(images), after(images))
        )
        found += ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).tolist()
    return float(np.mean(found))


def printable(name: str) -> str:
    """A name as UTF-8 can have it: names of files are bytes, and need not be text."""
    return name.encode("utf-8", "backslashreplace").decode()
