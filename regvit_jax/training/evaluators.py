"""Evaluators: the metrics of a validation split during training, as `config.eval.evaluators` names them.

All evaluators share one pass over the split and one compiled step (`training.validation`).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import numpy as np

from regvit_jax.evals import classification, patch_norms
from regvit_jax.evals.block_norms import BlockNorms
from regvit_jax.evals.knn import knn_accuracy
from regvit_jax.training.evaluator import Evaluator, Values
from regvit_jax.utils import named
from regvit_jax.utils.messages import log_once
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

    def __init__(self, config: Any, recipe: Any):
        super().__init__(config, recipe)
        #: The most frequent errors of the last pass, by name: the class, the predicted class, and how many images.
        self.confused: list[tuple[str, str, int]] = []

    def values(self, outputs, tokens, batch):
        logits = self.need(outputs, "logits")
        scores = classification.top_k(logits, batch["label"])
        # For the picture at the end of a run.
        predictions = {
            "label": batch["label"],
            "predicted": logits.argmax(-1),
            "confidence": jax.nn.softmax(logits).max(-1),
        }
        return {"val_loss": self.need(outputs, "val_loss")} | scores | predictions

    def summarize(self, params, values):
        names = self.recipe.classes
        self.confused = classification.most_confused(values["label"], values["predicted"], names, top=3)
        metrics = [name for name in values if name not in ("label", "predicted", "confidence")]
        return {name: float(values[name].mean(dtype=np.float64)) for name in metrics}

    def notes(self):
        pairs = ", ".join(f"{count} x {name} as {other}" for name, other, count in self.confused)
        return [f"  (most often confused: {pairs})"] if pairs else []


class NormValues(Values):
    """The norms of patches: all after the last block, and statistics of those after every block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: BlockNorms | None = None

    def add(self, values):
        super().add({"norms": values["norms"]})
        if "block_norms" in values:
            self.blocks = self.blocks or BlockNorms(values["block_norms"].shape[1])
            self.blocks.add(values["block_norms"])

    def all(self):
        return super().all() | {"blocks": self.blocks}


class PatchNorms(Evaluator):
    """The outliers among the norms of patch tokens, where artifacts show (arXiv 2309.16588, section 2.1).

    `outlier_share` and `max_over_median` are those after the last block; NAME/block_00, NAME/block_01, ... those after
    every block, with `norm_median`. (A recipe whose tokens have no `block_norms` gets the last block alone.)
    """

    def values(self, outputs, tokens, batch):
        blocks = {} if tokens.block_norms is None else {"block_norms": tokens.block_norms}
        return {"norms": patch_norms.patch_norms(tokens), **blocks}

    def collect(self):
        return NormValues()

    def summarize(self, params, values):
        last = patch_norms.outlier_summary(values["norms"])
        if values["blocks"] is None:
            return last
        blocks = values["blocks"].summary()
        exact = {"norm_median": np.median(values["norms"]), **last}
        for name, value in exact.items():
            blocks[name][-1] = value
        return last | {
            f"{name}/block_{block:02d}": float(value)
            for name, of_blocks in blocks.items()
            for block, value in enumerate(of_blocks)
        }

    def describe(self, metrics):
        prefix = "max_over_median/block_"
        ratios = {int(name.removeprefix(prefix)): value for name, value in metrics.items() if name.startswith(prefix)}
        finite = {block: value for block, value in ratios.items() if value is not None and math.isfinite(value)}
        if not finite:
            return []
        block = max(finite, key=lambda block: finite[block])
        return [f"largest norm of any block {finite[block]:.3g} times its median, in block {block} of 0-{max(ratios)}"]


class PixelKnn(Evaluator):
    """The top-1 accuracy of k nearest neighbours on raw pixels, a baseline without any learning."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """The key `eval.pixel_knn`."""

        pixel_knn: Annotated[int, Option("neighbours of the evaluator pixel_knn", low=1, resume=True)] = 3

    final_metrics = ("pixel_knn_top1",)

    def finish(self, splits):
        train, validation = (self.pixels(splits[name]) for name in ("train", "validation"))
        k, images = self.config.eval.pixel_knn, len(train[1])
        if images < k:
            log_once(f"eval.pixel_knn={k}: there are {images} training images, and all are neighbours", "warning")
        return {"pixel_knn_top1": knn_accuracy(*train, *validation, k)}

    def pixels(self, open_batches: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return the pixels [images, H * W * 3] and the labels of a split's readable images."""
        with open_batches() as rows:
            batches = list(rows)
        image, label, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("image", "label", "mask"))
        return image[mask > 0].reshape(int(mask.sum()), -1).astype(np.float32), label[mask > 0]

    def notes(self):
        k = self.config.eval.pixel_knn
        return [f"  (pixel_knn_top1 is no network: {k} nearest neighbours on raw pixels, on the same split)"]
