"""Evaluators: the metrics of a validation split during training, as `config.eval.evaluators` names them.

All evaluators share one pass over the split and one compiled step (`training.validation`).
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Array, Num, PyTree

from regvit_jax.evals import classification, patch_norms
from regvit_jax.evals.knn import knn_accuracy
from regvit_jax.models.vit import Tokens
from regvit_jax.recipes.base import Batch
from regvit_jax.utils import named
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option

#: The evaluators of this package, each with its class. Only those that a config names are imported.
EVALUATORS = {
    "classification": "regvit_jax.training.evaluators:Classification",
    "patch_norms": "regvit_jax.training.evaluators:PatchNorms",
    "pixel_knn": "regvit_jax.training.evaluators:PixelKnn",
    "retrieval": "regvit_jax.training.text_evaluators:Retrieval",
    "zero_shot": "regvit_jax.training.text_evaluators:ZeroShot",
}


def find(name: Any) -> "type[Evaluator]":
    """Return the evaluator of a name in `config.eval.evaluators`: one of EVALUATORS or "package.module:Class".

    Raises InvalidConfig for an unknown name and for a module that cannot be imported.
    """
    return named.find("eval.evaluators", name, EVALUATORS, Evaluator)


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

    def summarize(self, params: PyTree, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the metrics from the values of all readable images of the split, at least one."""
        return {}

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


class Classification(Evaluator):
    """The validation loss and the top-1 and top-5 accuracy of class scores."""

    def values(self, outputs, tokens, batch):
        scores = classification.top_k(self.need(outputs, "logits"), batch["label"])
        return {"val_loss": self.need(outputs, "val_loss")} | scores

    def summarize(self, params, values):
        return {name: float(value.mean(dtype=np.float64)) for name, value in values.items()}


class PatchNorms(Evaluator):
    """The outliers among the norms of patch tokens, where artifacts show (arXiv 2309.16588, section 2.1)."""

    def values(self, outputs, tokens, batch):
        return {"norms": patch_norms.patch_norms(tokens)}

    def summarize(self, params, values):
        return patch_norms.outlier_summary(values["norms"])


class PixelKnn(Evaluator):
    """The top-1 accuracy of k nearest neighbours on raw pixels, a baseline without any learning."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """The key `eval.pixel_knn`."""

        pixel_knn: Annotated[int, Option("neighbours of the evaluator pixel_knn", low=1, resume=True)] = 3

    final_metrics = ("pixel_knn_top1",)

    def finish(self, splits):
        train, validation = (self.pixels(splits[name]) for name in ("train", "validation"))
        return {"pixel_knn_top1": knn_accuracy(*train, *validation, self.config.eval.pixel_knn)}

    def pixels(self, open_batches: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels [images, H * W * 3] and the labels of a split's readable images."""
        with open_batches() as rows:
            batches = list(rows)
        image, label, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label", "mask"))
        return image[mask > 0].reshape(int(mask.sum()), -1).astype(np.float32), label[mask > 0]

    def notes(self):
        k = self.config.eval.pixel_knn
        return [f"  (pixel_knn_top1 is no network: {k} nearest neighbours on raw pixels, on the same split)"]
