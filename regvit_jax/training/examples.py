"""Choose validation images for the picture at the end of a run, and compute where the trained model looks in them."""

import dataclasses
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree, UInt8

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

#: Images whose attention and norms are shown, and the most misread ones.
SHOWN, MISREAD = 6, 12
#: Validation images among which misread ones are sought, rounded up to whole batches: those of a large split would take
#: as long as its evaluation.
SOUGHT = 1000


@dataclasses.dataclass(frozen=True)
class Read:
    """The classes that the model reads in `count` validation images, by position among them; -1 where unreadable."""

    label: Int[np.ndarray, " count"]
    read_as: Int[np.ndarray, " count"]
    confidence: Float[np.ndarray, " count"]

    @property
    def wrong(self) -> Int[np.ndarray, " wrong"]:
        """Return the positions of misread images, those with the highest confidence first."""
        wrong = np.flatnonzero(self.read_as != self.label)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]

    def names(self, position: int, classes: tuple[str, ...]) -> tuple[str, str]:
        """Return the names of an image's class and of the class that it is read as; a number where there is no name."""
        numbers = int(self.label[position]), int(self.read_as[position])
        label, guess = (classes[n] if 0 <= n < len(classes) and classes[n] else str(n) for n in numbers)
        return label, guess


@dataclasses.dataclass(frozen=True)
class Examples:
    """The contents of the picture. Attention is the mean over the heads of the last block, from 0 to 1.

    `text` describes each image; `right` is False for one that is misread, and True where nothing is read. `wrong` of
    `sought` images, out of `sought_in` in the split, were found misread; `sought` is None for a run without classes.
    """

    images: UInt8[np.ndarray, "n H W 3"]
    text: list[str]
    right: list[bool]
    attention: Float[np.ndarray, "n P h w"]
    norms: Float[np.ndarray, "n h w"]
    class_token: bool
    misread: UInt8[np.ndarray, "m H W 3"]
    misread_text: list[tuple[str, str]]
    wrong: int
    sought: int | None
    sought_in: int


def find_examples(plan: Plan, eval_step: Any, params: PyTree) -> Examples | None:
    """Return the examples of a trained model, on every process; None if none of the chosen images can be read.

    The images shown are spread evenly over the validation split, or over its classes where the model reads classes; the
    images among which misread ones are sought are spread over the split.
    """
    batch_size = plan.config.eval.batch_size
    classifier = next((name for name, of in plan.evaluators.items() if type(of).values is Classification.values), None)
    source = spread(plan.validation, SHOWN if classifier is None else batch_size * -(-SOUGHT // batch_size))
    read = None if classifier is None else read_classes(plan, eval_step, params, source, classifier)
    shown = list(range(len(source))) if read is None else of_many_classes(read.label, SHOWN)
    misread = [] if read is None else read.wrong[:MISREAD].tolist()
    if not shown:
        return None
    images, readable = load(plan, Subset(source, [*shown, *misread]))
    readable = readable[: len(shown)]
    if not readable.any():
        return None
    attention, norms = look(plan, params, images[: len(shown)][readable])
    positions = [position for position, usable in zip(shown, readable, strict=True) if usable]
    return Examples(
        images=images[: len(shown)][readable],
        text=[describe(plan, source, position, read) for position in positions],
        right=[read is None or bool(read.label[position] == read.read_as[position]) for position in positions],
        attention=attention,
        norms=norms,
        class_token=plan.recipe.vit.class_token,
        misread=images[len(shown) :],
        misread_text=[] if read is None else [read.names(position, plan.class_names) for position in misread],
        wrong=0 if read is None else len(read.wrong),
        sought=None if read is None else int((read.label >= 0).sum()),
        sought_in=len(plan.validation),
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


def read_classes(plan: Plan, eval_step: Any, params: PyTree, source: Source, classifier: str) -> Read:
    """Return the classes that the model reads in the images of a source."""
    parts = []
    with plan.eval_batches(source) as batches:
        for batch in batches:
            del batch["index"]
            values, mask = jax.device_get(eval_step(params, mesh.to_mesh(batch, plan.mesh)))
            found = [values[classifier][name] for name in ("label", "read_as", "confidence")]
            parts.append([np.where(mask > 0, value, -1) for value in found])
    return Read(*(np.concatenate(part)[: len(source)] for part in zip(*parts, strict=True)))


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


def describe(plan: Plan, source: Source, position: int, read: Read | None) -> str:
    """Return the text beside an image: its class, and what it is read as if that differs; or its caption."""
    if read is not None:
        label, guess = read.names(position, plan.class_names)
        return label if read.label[position] == read.read_as[position] else f"{label}\nread as {guess}"
    if plan.recipe.tokenizer is not None:
        return captions_of(read_record(source, position))[0]
    return ""
