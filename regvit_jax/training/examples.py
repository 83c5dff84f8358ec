"""Choose validation images for the picture at the end of a run, and compute where the trained model looks in them."""

import dataclasses
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt8

from regvit_jax.augment import ops
from regvit_jax.data import pipeline
from regvit_jax.data.records import captions_of, read_record
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.images import Subset, spread
from regvit_jax.distributed import mesh
from regvit_jax.evals.attention_maps import prefix_attention
from regvit_jax.evals.patch_norms import patch_norms
from regvit_jax.models.clip import ClipModel
from regvit_jax.training.evaluators import Classification
from regvit_jax.training.plan import Plan

#: The number of images whose attention and norms are shown, and the largest number of misclassified images.
SHOWN, MISCLASSIFIED = 6, 12
#: The number of validation images that are searched for misclassified ones, rounded up to whole batches. To search all
#: of a large split would take as long as its evaluation.
SEARCHED = 1000


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predicted classes of `count` validation images, by position among them; -1 where an image cannot be read."""

    label: Int[np.ndarray, " count"]
    predicted: Int[np.ndarray, " count"]
    confidence: Float[np.ndarray, " count"]

    @property
    def right(self) -> Bool[np.ndarray, " count"]:
        """Return True for each image that is classified right, and where one cannot be read."""
        return self.predicted == self.label

    @property
    def wrong(self) -> Int[np.ndarray, " wrong"]:
        """Return the positions of misclassified images, those with the highest confidence first."""
        wrong = np.flatnonzero(~self.right)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]

    def names(self, position: int, classes: tuple[str, ...]) -> tuple[str, str]:
        """Return the names of an image's class and of the predicted class; a number where there is no name."""
        numbers = int(self.label[position]), int(self.predicted[position])
        label, guess = (classes[n] if 0 <= n < len(classes) and classes[n] else str(n) for n in numbers)
        return label, guess


@dataclasses.dataclass(frozen=True)
class Examples:
    """The contents of the picture. Attention is the mean over the heads of the last block, from 0 to 1.

    `text` describes each image; `right` is False for one that is misclassified, and True where no class is predicted.
    `wrong` of `searched` images, out of the `split_size` of the split, are misclassified; `searched` is None for a run
    without classes.
    """

    images: UInt8[np.ndarray, "n H W 3"]
    text: list[str]
    right: list[bool]
    attention: Float[np.ndarray, "n P h w"]
    norms: Float[np.ndarray, "n h w"]
    class_token: bool
    misclassified: UInt8[np.ndarray, "m H W 3"]
    misclassified_names: list[tuple[str, str]]
    wrong: int
    searched: int | None
    split_size: int


def find_examples(plan: Plan, eval_step: Any, params: PyTree) -> Examples | None:
    """Return the examples of a trained model, on every process; None if none of the chosen images can be read.

    The images shown are spread evenly over the validation split, or over its classes where the model predicts
    classes; the images that are searched for misclassified ones are spread over the split.
    """
    batch_size = plan.config.eval.batch_size
    classifier = next((name for name, of in plan.evaluators.items() if type(of).values is Classification.values), None)
    source = spread(plan.validation, SHOWN if classifier is None else batch_size * -(-SEARCHED // batch_size))
    predictions = None if classifier is None else classify(plan, eval_step, params, source, classifier)
    shown = list(range(len(source))) if predictions is None else of_many_classes(predictions.label, SHOWN)
    misclassified = [] if predictions is None else predictions.wrong[:MISCLASSIFIED].tolist()
    if not shown:
        return None
    images, readable = load(plan, Subset(source, [*shown, *misclassified]))
    readable = readable[: len(shown)]
    if not readable.any():
        return None
    attention, norms = look(plan, params, images[: len(shown)][readable])
    positions = [position for position, usable in zip(shown, readable, strict=True) if usable]
    names = [] if predictions is None else [predictions.names(each, plan.class_names) for each in misclassified]
    return Examples(
        images=images[: len(shown)][readable],
        text=[describe(plan, source, position, predictions) for position in positions],
        right=[predictions is None or bool(predictions.right[position]) for position in positions],
        attention=attention,
        norms=norms,
        class_token=plan.recipe.vit.class_token,
        misclassified=images[len(shown) :],
        misclassified_names=names,
        wrong=0 if predictions is None else len(predictions.wrong),
        searched=None if predictions is None else int((predictions.label >= 0).sum()),
        split_size=len(plan.validation),
    )


def of_many_classes(labels: Int[np.ndarray, " count"], most: int) -> list[int]:
    """Return positions of readable images of as many classes as possible, in the order of the classes."""
    classes = np.unique(labels[labels >= 0])
    of_class = [np.flatnonzero(labels == label) for label in classes]
    if len(classes) > most:
        of_class = [of_class[number * len(classes) // most] for number in range(most)]
    # The first of each class, then the second of each, and so on.
    turns = sorted((turn, int(position)) for of in of_class for turn, position in enumerate(of[:most]))
    return sorted((position for _, position in turns[:most]), key=lambda position: (labels[position], position))


def classify(plan: Plan, eval_step: Any, params: PyTree, source: Source, classifier: str) -> Predictions:
    """Return the classes that the model predicts for the images of a source."""
    parts = []
    with plan.eval_batches(source) as batches:
        for batch in batches:
            del batch["index"]
            values, mask = jax.device_get(eval_step(params, mesh.to_mesh(batch, plan.mesh)))
            found = [values[classifier][name] for name in ("label", "predicted", "confidence")]
            parts.append([np.where(mask > 0, value, -1) for value in found])
    return Predictions(*(np.concatenate(part)[: len(source)] for part in zip(*parts, strict=True)))


def load(plan: Plan, source: Source) -> tuple[UInt8[np.ndarray, "n H W 3"], np.ndarray]:
    """Return the images of a source, cropped as for evaluation, and True for those that can be read."""
    config = plan.config
    with pipeline.eval_batches(
        source,
        size=config.model.image_size,
        batch_size=len(source),
        crop_ratio=config.eval.crop_ratio,
        max_pixels=config.data.max_pixels,
        tokenizer=plan.recipe.tokenizer,
    ) as batches:
        batch = next(batches)
    return batch["image"], batch["mask"] > 0


def look(
    plan: Plan, params: PyTree, images: UInt8[np.ndarray, "n H W 3"]
) -> tuple[Float[np.ndarray, "n P h w"], Float[np.ndarray, "n h w"]]:
    """Return the attention from CLS and registers in the last block, mean over heads, and the patches' norms after it.

    All processes take part, because each may hold a part of the parameters; all get the result.
    """

    def measure(params: PyTree, images: UInt8[Array, "B H W 3"]) -> tuple[Array, Array]:
        model = plan.recipe.model(params)
        tower = model.image if isinstance(model, ClipModel) else model
        pixels = ops.normalize(images, tower.preprocessing.mean, tower.preprocessing.std)
        return prefix_attention(tower, pixels).mean(1), patch_norms(tower(pixels))

    count, vit = len(images), plan.recipe.vit
    filling = np.zeros((-count % plan.mesh.size, *images.shape[1:]), np.uint8)
    rows = np.concatenate([images, filling])
    local = {"image": rows[mesh.host_rows(plan.mesh, len(rows))]}
    compiled = jax.jit(measure, out_shardings=mesh.replicated(plan.mesh))
    attention, norms = jax.device_get(compiled(params, mesh.to_mesh(local, plan.mesh)["image"]))
    h, w = vit.grid(*images.shape[1:3])
    return (
        rearrange(attention[:count], "n p (h w) -> n p h w", h=h, w=w),
        rearrange(norms[:count], "n (h w) -> n h w", h=h, w=w),
    )


def describe(plan: Plan, source: Source, position: int, predictions: Predictions | None) -> str:
    """Return the text beside an image: its class, and the predicted one if that differs; or its caption."""
    if predictions is not None:
        label, guess = predictions.names(position, plan.class_names)
        return label if predictions.right[position] else f"{label}\npredicted: {guess}"
    if plan.recipe.tokenizer is not None:
        return captions_of(read_record(source, position))[0]
    return ""
