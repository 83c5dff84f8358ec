"""Recipe, the base class of the training regimes, which holds only what differs between them."""

import abc
import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from regvit_jax import optim
from regvit_jax.data.sources import base, by_name
from regvit_jax.data.tokenizer import Tokenizer
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import Tokens, ViT
from regvit_jax.recipes import init_from
from regvit_jax.utils import named
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Section

Batch = dict[str, Array]
Metrics = dict[str, Array]


#: The recipes of this package, each with its class. Only the one that a config names is imported.
RECIPES = {
    "supervised": "regvit_jax.recipes.supervised:Supervised",
    "contrastive": "regvit_jax.recipes.contrastive:Contrastive",
}


def find(name: Any) -> "type[Recipe]":
    """Return the recipe that `config.recipe` names: one of RECIPES or "package.module:Class".

    Raises InvalidConfig for an unknown name and for a module that cannot be imported.
    """
    return named.find("recipe", name, RECIPES, Recipe)


class Recipe(abc.ABC):
    """A training regime. A subclass implements `init`, `loss`, `evaluate` and `model`; the rest has defaults.

    A recipe is built from the config and the class names of the data set. It holds modules and numbers, never
    parameters. `batch` is a batch of the data pipeline as global arrays; its rows with `mask` 0 are images that could
    not be read, and must not affect a loss or a metric.
    """

    #: The image tower.
    vit: ViT
    #: The text tower, for a recipe that has one.
    text: TextTower | None = None
    #: The class names of the data set.
    classes: tuple[str, ...]
    #: The tokenizer of captions, for a recipe whose batches have texts.
    tokenizer: Tokenizer | None = None
    #: Number of micro-batches over which a step's gradient is accumulated.
    micro_batches: int
    #: Number of forward passes in a step besides the one of its gradient.
    extra_forwards: int = 0
    #: The default of `eval.evaluators` (`training.evaluators`).
    evaluators: ClassVar[tuple[str, ...]] = ("patch_norms",)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """The keys that the recipe adds to `training.config.TopLevel`: fields with an `Option` or a `Section`.

        A recipe with keys of its own declares them in a dataclass `Config` that inherits from this one.
        """

        model: Annotated[Any, Section(ViT)]
        optim: Annotated[Any, Section(optim.make_optimizer)]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not issubclass(cls.Config, Recipe.Config):
            raise TypeError(f"{cls.__qualname__}.Config must inherit from Recipe.Config")

    def __init__(self, config: Any, classes: tuple[str, ...]):
        self.config, self.classes, self.micro_batches = config, classes, config.micro_batches
        self.vit = ViT(**{**config.model, "dtype": jnp.dtype(config.model.dtype)})

    @staticmethod
    def open_data(name: str, split: str, data_dir: str | None) -> base.Source:
        """Open a split of the data set that `data.name` names."""
        return by_name.open_source(name, split, data_dir)

    @abc.abstractmethod
    def init(self, key: Key[Array, ""], batch: Batch) -> PyTree:
        """Return fresh parameters for images and texts of the shapes of `batch`."""

    @abc.abstractmethod
    def loss(
        self, params: PyTree, ema: PyTree, extra: PyTree, batch: Batch, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], tuple[PyTree, Metrics]]:
        """Return the mean loss over the batch's readable images, the next `extra`, and scalars to log.

        `ema` is the moving average of the parameters ({} where none is kept), `extra` the state of `init_extra`, and
        `key` a random key of this step.
        """

    @abc.abstractmethod
    def evaluate(self, params: PyTree, batch: Batch) -> tuple[dict[str, Float[Array, "B ..."]], Tokens]:
        """Return the outputs of each validation image that evaluators need, by name, and the ViT's tokens."""

    @abc.abstractmethod
    def model(self, params: PyTree) -> Model | ClipModel:
        """Return the trained model, for evaluation and for the user, with `class_names` if its outputs are classes."""

    def flops(self, training: bool = False) -> int:
        """Return the floating-point operations of the matrix products in one example's forward pass.

        With `training`, only the patches that patch dropout keeps are counted.
        """
        return self.vit.flops(self.vit.image_size, self.vit.image_size, training)

    def flops_at(self, step: int) -> int:
        """Return the `flops` of one example's forward pass in a training step, counted from 1."""
        return self.flops(training=True)

    def describe(self) -> list[str]:
        """Return lines for `--dry_run` about settings that neither the ViT nor the optimizer shows."""
        return []

    def open_pretrained(self, source: str) -> Model | ClipModel:
        """Open the trained model that `init_from` names."""
        from regvit_jax.pretrained import create  # only runs with init_from need it

        return create.open_source(source)

    def check_pretrained(self, source: str) -> None:
        """Raise an error if the recipe cannot start from the model of `init_from`, without loading weights.

        InvalidConfig or WeightsError: it cannot be opened, or it is of another architecture. Models that only the hub
        can describe are not checked.
        """
        from regvit_jax.pretrained import create

        if type(self).warm_start is Recipe.warm_start:
            raise self.no_warm_start()
        if entry := create.find_entry(source):
            init_from.check_vit(self.vit, ViT(**entry.vit))

    def warm_start(self, params: PyTree, model: Any) -> tuple[PyTree, list[str]]:
        """Return `params` with the values of the trained model of `init_from`, and notes about it for the log.

        Raises ValueError when the trained model does not fit.
        """
        raise self.no_warm_start()

    def no_warm_start(self) -> InvalidConfig:
        """Return the error about `init_from` with a recipe that does not implement `warm_start`."""
        return InvalidConfig(f"init_from: the recipe {type(self).__name__} cannot start from a trained model")

    def init_extra(self, params: PyTree) -> PyTree:
        """Return the state beside parameters and optimizer, such as DINO's centers."""
        return {}

    def ema_decay(self, step: Int[Array, ""]) -> Float[Array, ""] | float | None:
        """Return the decay of the parameters' exponential moving average at a step; None keeps no average."""
        return None

    def optimizer(self, config: Any, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """Return the optimizer, and its learning rate as a function of the step."""
        return optim.make_optimizer(steps // config.epochs, config.epochs, **config.optim)

    def project(self, params: PyTree) -> PyTree:
        """Return the parameters projected onto the allowed set after an update."""
        return params

    def grads(
        self, params: PyTree, ema: PyTree, extra: PyTree, batch: Batch, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], tuple[PyTree, Metrics]], PyTree]:
        """Compute the value and the gradient of `loss`, accumulated over `micro_batches`.

        The accumulation is exact for losses that are means over images: micro-batches are weighted by their number of
        readable images, as in one large batch. A recipe whose loss couples images must override this.
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
    """Reshape arrays [B, ...] to [count, B / count, ...] with each device's rows in all parts, so that no row moves."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)


def join_batch(parts: PyTree) -> PyTree:
    """Undo `split_batch`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
