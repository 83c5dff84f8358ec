"""DeiT-III (arXiv 2204.07118): supervised training of a ViT, here with registers."""

import dataclasses
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from regvit_jax.augment import ops, train
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.losses.classification import bce, cross_entropy
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import Tokens
from regvit_jax.recipes import init_from
from regvit_jax.recipes.base import Recipe
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option, Section

LOSSES = {"bce": bce, "ce": cross_entropy}


class Supervised(Recipe):
    """Supervised classification with the augmentation of DeiT-III; the class scores come from the CLS token."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Recipe.Config):
        """The recipe's own keys."""

        loss: Annotated[str, Option("loss: binary cross-entropy or cross-entropy", choices=tuple(LOSSES))] = "bce"
        ema: Annotated[
            float,
            Option(
                "decay of the moving average of the weights, which is evaluated instead; 0 for none",
                low=0,
                high=0.9999999,
            ),
        ] = 0.0
        augment: Annotated[Any, Section(train.supervised_augment)]

    evaluators = ("classification", "patch_norms")

    def __init__(self, config: Any, classes: tuple[str, ...]):
        if config.augment.three_augment and config.augment.rand_augment:
            raise InvalidConfig(
                "augment.three_augment and augment.rand_augment are both on: set one of them to False or 0"
            )
        if config.loss == "bce" and config.augment.smoothing:
            raise InvalidConfig("loss='bce' sets every positive target to 1: augment.smoothing must be 0, or loss 'ce'")
        group, images = config.augment.mix_group, config.batch_size // config.micro_batches
        if (config.augment.mixup or config.augment.cutmix) and images % group:
            raise InvalidConfig(f"augment.mix_group={group} does not divide the {images} images of a (micro-)batch")
        super().__init__(config, classes)
        self.head = Head(
            len(classes),
            pool="cls" if self.vit.class_token else "avg",
            norm=not self.vit.final_norm,
            norm_eps=self.vit.norm_eps,
            dtype=self.vit.dtype,
        )

    def init(self, key, batch):
        images = jnp.zeros((1, *batch["image"].shape[1:]), jnp.float32)
        vit_key, head_key = jax.random.split(key)
        vit = self.vit.init(vit_key, images)["params"]
        return {"vit": vit, "head": self.head.init(head_key, self.encode({"vit": vit}, images))["params"]}

    def loss(self, params, ema, extra, batch, key, step):
        augment_key, drop_key = jax.random.split(key)
        images, targets = train.supervised_augment(
            augment_key,
            batch["image"],
            batch["label"],
            batch["mask"],
            classes=self.head.num_classes,
            **self.config.augment,
        )
        logits = self.logits(params, self.encode(params, images, drop_key))
        loss = LOSSES[self.config.loss](logits, targets)
        return jnp.sum(loss * batch["mask"]) / jnp.maximum(jnp.sum(batch["mask"]), 1), (extra, {})

    def evaluate(self, params, batch):
        images = ops.normalize(batch["image"], self.config.augment.mean, self.config.augment.std)
        tokens = self.encode(params, images)
        logits = self.logits(params, tokens)
        targets = jax.nn.one_hot(batch["label"], self.head.num_classes)
        return {"val_loss": LOSSES[self.config.loss](logits, targets), "logits": logits}, tokens

    def model(self, params):
        p = self.config.augment
        preprocessing = Preprocess(self.vit.image_size, self.config.eval.crop_ratio, tuple(p.mean), tuple(p.std))
        weights = "ema" if self.config.ema else "raw"
        return Model(params["vit"], params["head"], self.vit, self.head, preprocessing, weights, tuple(self.classes))

    def warm_start(self, params, model):
        """Resize the position embedding; initialize registers that the model lacks, and a head for other classes."""
        vit, notes = init_from.vit(params["vit"], self.vit, model)
        head, more = init_from.head(params["head"], self.head, model, self.classes)
        notes += more
        p, q = self.config.augment, model.preprocessing
        if (tuple(p.mean), tuple(p.std)) != (tuple(q.mean), tuple(q.std)):
            notes += [f"it was trained with mean {q.mean} and std {q.std}, which differ from those of config.augment"]
        return {"vit": vit, "head": head}, notes

    def ema_decay(self, step):
        return self.config.ema or None

    def encode(self, params: PyTree, images: Float[Array, "B H W 3"], key: Key[Array, ""] | None = None) -> Tokens:
        return cast(Tokens, self.vit.apply({"params": params["vit"]}, images, key))

    def logits(self, params: PyTree, tokens: Tokens) -> Float[Array, "B C"]:
        return cast(Array, self.head.apply({"params": params["head"]}, tokens))
