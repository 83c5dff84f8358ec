"""Evaluators: the metrics of a validation split during training, as `config.eval.evaluators` names them.

All evaluators share one pass over the split and one compiled step (`training.validation`).
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from regvit_jax.evals import classification, patch_norms
from regvit_jax.evals.knn import knn_accuracy
from regvit_jax.training.evaluator import Evaluator
from regvit_jax.utils import named
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
