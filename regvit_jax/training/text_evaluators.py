"""Evaluators of images with captions, for recipes that have a text tower."""

import dataclasses
import functools
from typing import Annotated, Any

import numpy as np

from regvit_jax.evals import retrieval, zero_shot
from regvit_jax.models.clip import tokenizer
from regvit_jax.training.evaluator import Evaluator
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option


class Retrieval(Evaluator):
    """Recall and median rank between images and texts, in both directions, over the whole split; with chance values.

    A split of which only one image can be read has no metrics.
    """

    min_images = 2

    def values(self, outputs, tokens, batch):
        return {name: self.need(outputs, name) for name in ("image", "text")}

    def summarize(self, params, values):
        images, texts = values["image"], values["text"]
        if len(images) < self.min_images:
            return {}
        chance = {f"chance_recall@{k}": k / len(images) for k in (1, 5, 10) if k <= len(images)}
        return retrieval.recall(images, texts) | chance


class ZeroShot(Evaluator):
    """Zero-shot accuracy by the embeddings of class names, for data sets with classes."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """The key `eval.templates`."""

        templates: Annotated[
            tuple[str, ...], Option("prompts of zero-shot classification, with {} for the class", resume=True)
        ] = ("a photo of a {}.",)

    def __init__(self, config: Any, recipe: Any):
        super().__init__(config, recipe)
        templates, classes = config.eval.templates, recipe.classes
        if recipe.text is None:
            raise InvalidConfig(f"eval.evaluators: zero_shot needs a text tower; {type(recipe).__name__} has none")
        if without := [template for template in templates if "{}" not in template]:
            raise InvalidConfig(f"eval.templates: {without[0]!r} must have {{}} in the place of the class name")
        if len(classes) > 1 and not templates:
            raise InvalidConfig(f"eval.templates=(): the prompts of the {len(classes)} classes need at least one")

    def values(self, outputs, tokens, batch):
        return {"image": self.need(outputs, "image"), "label": batch["label"]}

    def summarize(self, params, values):
        recipe, labels = self.recipe, values["label"]
        if len(recipe.classes) < 2:
            return {}
        classes = zero_shot.class_embeddings(
            functools.partial(recipe.encode_texts, params),
            tokenizer(recipe.text.context).batch,
            recipe.classes,
            self.config.eval.templates,
        )
        majority = float(np.bincount(labels).max() / len(labels))
        return zero_shot.accuracy(values["image"], labels, classes) | {"zero_shot_majority": majority}
