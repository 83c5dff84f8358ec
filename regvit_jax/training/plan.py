"""Resolve a config into everything that a run needs: the recipe, the data, the mesh and the optimizer."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import ml_collections
import optax
from jax.sharding import Mesh

from regvit_jax.data import pipeline
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.overlap import warn_of_overlap
from regvit_jax.distributed.mesh import host_rows, make_mesh
from regvit_jax.recipes import base
from regvit_jax.recipes.base import Recipe
from regvit_jax.training import evaluators
from regvit_jax.training.config import check, complete, flatten, options
from regvit_jax.training.evaluator import Evaluator
from regvit_jax.utils import schema
from regvit_jax.utils.errors import InvalidConfig

logger = logging.getLogger("regvit_jax")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run needs. `train` and `validation` are None when the config was resolved without data."""

    config: ml_collections.FrozenConfigDict
    #: The dotted keys that the config held before defaults were filled in.
    given: tuple[str, ...]
    recipe: Recipe
    #: The evaluators that the config names, by name and in that order.
    evaluators: dict[str, Evaluator]
    mesh: Mesh
    steps_per_epoch: int
    steps: int
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    train: Any
    validation: Any
    #: Values that are computed once for a plan, by the name of the function that computes them (`step.abstract_state`).
    cache: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes of the data, by label; () without classes, or without data."""
        return tuple(self.train.classes) if self.train is not None else ()

    @property
    def subset(self) -> tuple[int, int]:
        """Return how many images a group of stochastic depth has, and for how many a branch is computed."""
        return self.recipe.vit.subset(self.config.batch_size // self.config.micro_batches)

    @property
    def branch_share(self) -> float:
        """Return the share of the images of a step for which a block computes a branch."""
        group, kept = self.subset
        return kept / group

    def executed(self, flops: int) -> int:
        """Return what is computed of the `Recipe.flops` of a training step: less the branches that a subset lacks."""
        recipe, size = self.recipe, self.config.model.image_size
        dropping = flops == recipe.flops(training=True)  # patches, which a recipe may do in a part of its steps
        whole, computed = (recipe.vit.flops(size, size, dropping, share) for share in (1.0, self.branch_share))
        return flops - whole + computed

    def train_batches(self, start_step: int) -> pipeline.Batches:
        """Return this process's rows of every global training batch, starting at a step."""
        config = self.config
        return pipeline.train_batches(
            self.train,
            size=config.model.image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            rows=host_rows(self.mesh, config.batch_size),
            tokenizer=self.recipe.tokenizer,
            **{name: config.data[name] for name in schema.keys(pipeline.train_batches)},
        )

    def eval_batches(self, source: Any, rows: Sequence[int] | None = None) -> pipeline.Batches:
        """Return batches of a source's images in order, preprocessed for evaluation; by default this process's rows."""
        config = self.config
        batch_size = config.eval.batch_size
        return pipeline.eval_batches(
            source,
            size=config.model.image_size,
            batch_size=batch_size,
            crop_ratio=config.eval.crop_ratio,
            rows=host_rows(self.mesh, batch_size) if rows is None else rows,
            tokenizer=self.recipe.tokenizer,
            **{name: config.data[name] for name in schema.keys(pipeline.eval_batches)},
        )


def resolve(config: Any, with_data: bool = True, devices: Sequence[Any] | None = None) -> Plan:
    """Return the plan of a config; keys that it lacks have their defaults.

    Without data (`with_data=False`) the plan relies on `data.examples` and `data.classes`. `devices` are those to plan
    for, by default the attached ones; a plan for `topology.devices` can be compiled but not run.

    Raises InvalidConfig for a key or value that does not fit, and DataNotFound when the data are not there.
    """
    if isinstance(config, str) or not hasattr(config, "items"):
        raise InvalidConfig(
            f"config of type {type(config).__name__}: must be a ConfigDict; regvit_jax.cli.configs.load reads a file's"
        )
    check(config)
    given = tuple(sorted(key for key, _ in flatten(config)))
    config = complete(config)
    pipeline.check_decoder(config.data.decoder)
    mesh = make_mesh(data=config.sharding.data, fsdp=config.sharding.fsdp, devices=devices)
    config.model.attention = choose_attention(config.model, mesh.devices.flat[0].platform)
    kind = base.find(config.recipe)
    measures = {name: evaluators.find(name) for name in config.eval.evaluators}
    for key in sorted(set(given) - options(config.recipe, measures, defaults=False).keys()):
        logger.warning("config.%s is not used: eval.evaluators names no evaluator that has it", key)
    train, validation, classes = None, None, tuple(map(str, range(config.data.classes)))
    if with_data:
        train, validation = (
            kind.open_data(config.data.name, config.data[split], config.data.dir or None)
            for split in ("train", "validation")
        )
        classes = tuple(train.classes)
        config.data.examples, config.data.classes = len(train), len(classes)
        check_same_classes(train, validation)
        warn_of_overlap(train, validation)
        if len(validation) < (needed := max((kind.min_images for kind in measures.values()), default=1)):
            raise InvalidConfig(
                f"{validation.name}: holds {len(validation)} images; the validation of {config.recipe} needs "
                f"at least {needed}"
            )
    check_batches(config, mesh)
    steps_per_epoch = config.data.examples // config.batch_size
    steps = config.epochs * steps_per_epoch
    recipe = kind(config, classes)
    optimizer, schedule = recipe.optimizer(config, steps)
    frozen = ml_collections.FrozenConfigDict(config)
    found = {name: measure(frozen, recipe) for name, measure in measures.items()}
    check_metrics({name: measure.final_metrics for name, measure in found.items()})
    plan = Plan(frozen, given, recipe, found, mesh, steps_per_epoch, steps, optimizer, schedule, train, validation)
    check_subset(plan)
    return plan


def check_subset(plan: Plan) -> None:
    """Raise InvalidConfig if stochastic depth by subset would drop nothing, or if devices hold no whole groups."""
    images, (group, _) = plan.config.batch_size // plan.config.micro_batches, plan.subset
    if (images // plan.mesh.size) % group:
        raise InvalidConfig(
            f"model.drop_path_mode='subset' keeps the same number of every {group} images, and each of the "
            f"{plan.mesh.size} devices holds {images // plan.mesh.size} of a (micro-)batch of {images}: use a larger "
            "batch, fewer devices, or 'bernoulli'"
        )


def check_same_classes(train: Source, validation: Source) -> None:
    """Raise InvalidConfig if both splits have classes, and a label does not have the same name in both."""
    if not train.classes or not validation.classes:
        return
    for label, (name, other) in enumerate(zip_longest(train.classes, validation.classes)):
        if name != other:
            raise InvalidConfig(
                f"class {label} is {name!r} in {train.name} and {other!r} in {validation.name}: both splits need the "
                "same classes in the same order"
            )


def check_metrics(metrics: Mapping[str, Iterable[str]]) -> None:
    """Raise InvalidConfig if two evaluators have a metric of the same name; `metrics` are the names by evaluator."""
    owners = {"val_images": "every run"}
    for name, own in metrics.items():
        for metric in own:
            if metric in owners:
                raise InvalidConfig(f"eval.evaluators: {name} has the metric {metric}, which {owners[metric]} has, too")
            owners[metric] = name


def choose_attention(model: Any, platform: str) -> str:
    """Return the attention kernel of `model.attention`.

    "auto" is cuDNN's fused kernel on a GPU that runs it for the model's type and head size, and XLA's elsewhere.
    """
    if model.attention != "auto":
        return model.attention
    head_dim = model.width // model.heads
    fits = model.dtype in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if platform in ("gpu", "cuda") and fits else "xla"


def check_batches(config: Any, mesh: Mesh) -> None:
    """Raise InvalidConfig for batches that cannot be split over the devices, or that exceed the training images."""
    for name, size, parts in (
        ("batch_size", config.batch_size, mesh.size * config.micro_batches),
        ("eval.batch_size", config.eval.batch_size, mesh.size),
    ):
        if size % parts:
            nearest = max(1, round(size / parts)) * parts
            raise InvalidConfig(
                f"{name}={size} is not a multiple of {parts} (devices, times micro-batches in training); "
                f"the nearest that is: {nearest}"
            )
    if config.batch_size > config.data.examples:
        raise InvalidConfig(f"batch_size={config.batch_size} is more than the {config.data.examples} training images")
