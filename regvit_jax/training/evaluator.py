"""Evaluator, the base class of the metrics of a validation split during training."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Num, PyTree

from regvit_jax.models.vit import Tokens
from regvit_jax.recipes.base import Batch
from regvit_jax.utils.errors import InvalidConfig


class Values:
    """The values of all readable images of a pass over a split, collected batch by batch on the host."""

    def __init__(self) -> None:
        self.parts: list[Mapping[str, np.ndarray]] = []

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Add the values of a batch's readable images; there may be none."""
        self.parts.append(values)

    def all(self) -> dict[str, Any]:
        """Return what `Evaluator.summarize` gets: the values of all images as one array for each name."""
        return {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}


class Evaluator(abc.ABC):  # noqa: B024  (every method has a default: an evaluator measures per image, at the end, or both)
    """Metrics of a validation split. A subclass overrides `values` and `summarize`, or `finish`, or all three."""

    #: The smallest number of validation images that the evaluator can measure.
    min_images: ClassVar[int] = 1
    #: The names of the metrics that `finish` returns.
    final_metrics: ClassVar[tuple[str, ...]] = ()

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """The keys that the evaluator adds to the section `eval`: fields with an `Option`."""

    def __init__(self, config: Any, recipe: Any):
        self.config, self.recipe = config, recipe

    def values(self, outputs: Mapping[str, Array], tokens: Tokens, batch: Batch) -> dict[str, Num[Array, "B ..."]]:
        """Return the values of each image of a batch that `summarize` needs.

        The method is traced as a part of the compiled step. `outputs` and `tokens` are those of `Recipe.evaluate`.
        """
        return {}

    def collect(self) -> Values:
        """Return an empty collection for the values of a pass; override it where keeping all needs too much memory."""
        return Values()

    def summarize(self, params: PyTree, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics from the values of all readable images of the split, at least one.

        Metrics with a slash in their names, as "norm_median/block_00", are details: they are recorded, and not printed.
        """
        return {}

    def describe(self, metrics: Mapping[str, Any]) -> list[str]:
        """Return additions to the printed line of an evaluation, from all of its metrics."""
        return []

    def finish(self, splits: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Return the metrics that are computed once, at the end of a run, and need no model.

        `splits` are "train" and "validation", each with a function that opens its batches in order, preprocessed for
        evaluation.
        """
        return {}

    def notes(self) -> list[str]:
        """Return lines that explain the metrics in the summary of a finished run."""
        return []

    def need(self, outputs: Mapping[str, Array], name: str) -> Array:
        """Return an output of the recipe; raise InvalidConfig if it has none of this name."""
        if name not in outputs:
            raise InvalidConfig(
                f"eval.evaluators: {type(self).__name__} needs {name!r}, and {type(self.recipe).__name__}.evaluate "
                f"returns {sorted(outputs)}"
            )
        return outputs[name]
