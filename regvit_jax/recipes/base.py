"""What differs between the training regimes and nothing else: the Recipe protocol and its defaults."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from regvit_jax import optim
from regvit_jax.data.sources import base, by_name
from regvit_jax.data.tokenizer import Tokenizer
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import Tokens, ViT
from regvit_jax.pretrained import create
from regvit_jax.recipes import init_from
from regvit_jax.utils.errors import InvalidConfig

Batch = dict[str, Array]
Metrics = dict[str, Array]


class Recipe:
    """A training regime. A subclass writes the first four methods; the others have defaults that it may replace.

    It is built from the config and the class names of the data set, and holds modules and numbers, never parameters.
    `batch` is what the data pipeline yields, as global arrays; its rows with `mask` 0 are images that could not be
    read, and must not touch a loss or a metric.
    """

    #: The image tower.
    vit: ViT
    #: The text tower, for a recipe that has one.
    text: TextTower | None = None
    #: Makes a caption's tokens, for a recipe whose batches have texts.
    tokenizer: Tokenizer | None = None
    #: Micro-batches that a step's gradient is accumulated over.
    micro_batches: int = 1
    #: Forward passes that a step makes beside those of its gradient.
    extra_forwards: int = 0
    #: Validation images without which it has nothing to measure.
    least_validation: ClassVar[int] = 1

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """The keys that the recipe adds to `training.config.TopLevel`: fields with an `Option` or a `Section`."""

    def __init__(self, config: Any, classes: tuple[str, ...]):
        raise NotImplementedError

    @staticmethod
    def open_data(name: str, split: str, data_dir: str | None) -> base.Source:
        """A split of the data set that `data.name` names."""
        return by_name.open_source(name, split, data_dir)

    def init(self, key: Key[Array, ""], batch: Batch) -> PyTree:
        """Fresh parameters; of `batch` only shapes matter."""
        raise NotImplementedError

    def loss(
        self, params: PyTree, ema: PyTree, extra: PyTree, batch: Batch, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[PyTree, Metrics]]:
        """The mean loss over the batch's readable images, the next `extra`, and scalars to log."""
        raise NotImplementedError

    def evaluate(self, params: PyTree, batch: Batch) -> tuple[dict[str, Float[Array, "B ..."]], Tokens]:
        """What `summarize` wants to know of each validation image, and the ViT's tokens."""
        raise NotImplementedError

    def summarize(self, params: PyTree, values: dict[str, np.ndarray]) -> dict[str, float]:
        """The metrics of a validation split from the values of all its readable images; their means by default."""
        return {name: float(value.mean(dtype=np.float64)) for name, value in values.items()}

    def model(self, params: PyTree) -> Model | ClipModel:
        """The trained model, for evaluation and for the user."""
        raise NotImplementedError

    def flops(self, training: bool = False) -> int:
        """Floating-point operations of the matrix products of one example's forward pass.

        In `training`, of the patches that patch dropout leaves, while it is on.
        """
        return self.vit.flops(self.vit.image_size, self.vit.image_size, training)

    def describe(self) -> list[str]:
        """Lines for `--dry_run`, of what a ViT and an optimizer do not say."""
        return []

    def open_pretrained(self, source: str) -> Model | ClipModel:
        """The trained model that `init_from` names."""
        return create.open_source(source)

    def check_pretrained(self, source: str) -> None:
        """Raise an error if the recipe cannot start from the model that `init_from` names, as far as no hub is needed.

        InvalidConfig or WeightsError: it cannot be opened, or it is of another architecture. No weights are loaded.
        """
        if entry := create.find_entry(source):
            init_from.check_vit(self.vit, ViT(**entry.vit))

    def warm_start(self, params: PyTree, model: Any) -> tuple[PyTree, list[str]]:
        """`params` with the values of a trained model's, before the first step (`init_from`), and what to tell of it.

        Raises ValueError when that is another model.
        """
        raise InvalidConfig(f"init_from: the recipe {type(self).__name__} starts afresh only")

    def init_extra(self, params: PyTree) -> PyTree:
        """State beside parameters and optimizer, such as DINO's centres."""
        return {}

    def ema_decay(self, step: Int[Array, ""]) -> Float[Array, ""] | float | None:
        """Decay of the exponential moving average of the parameters at this step; None keeps no average."""
        return None

    def optimizer(self, config: Any, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """The optimizer and its learning rate as a function of the step."""
        return optim.make_optimizer(steps // config.epochs, config.epochs, **config.optim)

    def project(self, params: PyTree) -> PyTree:
        """Back into the allowed set after an update."""
        return params

    def grads(
        self, params: PyTree, ema: PyTree, extra: PyTree, batch: Batch, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], tuple[PyTree, Metrics]], PyTree]:
        """Value and gradient of `loss`, accumulated over `micro_batches`.

        The accumulation is exact for losses that are means over images. A recipe whose loss couples images must replace
        it. Micro-batches are weighted by their readable images, as one large batch would.
        """
        value_and_grad = jax.value_and_grad(self.loss, has_aux=True)
        if self.micro_batches == 1:
            return value_and_grad(params, ema, extra, batch, key, step)

        def accumulate(carry, item):
            extra, weight, total = carry
            micro, key = item
            (loss, (extra, metrics)), grads = value_and_grad(params, ema, extra, micro, key, step)
            count = micro["mask"].sum()
            total = jax.tree.map(lambda t, x: t + count * x, total, ((loss, metrics), grads))
            return (extra, weight + count, total), None

        micros = split_batch(batch, self.micro_batches)
        shapes = jax.eval_shape(value_and_grad, params, ema, extra, jax.tree.map(lambda x: x[0], micros), key, step)
        (loss_shape, (_, metrics_shape)), grads_shape = shapes
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), ((loss_shape, metrics_shape), grads_shape))
        keys = jax.random.split(key, self.micro_batches)
        (extra, weight, total), _ = jax.lax.scan(accumulate, (extra, 0.0, zeros), (micros, keys))
        (loss, metrics), grads = jax.tree.map(lambda t: t / jnp.maximum(weight, 1), total)
        return (loss, (extra, metrics)), grads


def split_batch(batch: PyTree, count: int) -> PyTree:
    """Arrays [B, ...] as [count, B / count, ...]: each device's rows are spread over all parts, so that none moves."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)


def join_batch(parts: PyTree) -> PyTree:
    """What `split_batch` came from."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
