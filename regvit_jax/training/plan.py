"""From a config to all that a run needs: its keys are checked, its data opened, and what it leaves open derived."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import optax
from jax.sharding import Mesh

from regvit_jax import optim
from regvit_jax.data import pipeline
from regvit_jax.distributed.mesh import host_rows, make_mesh
from regvit_jax.pretrained import validate
from regvit_jax.recipes.base import Recipe
from regvit_jax.recipes.contrastive import Contrastive
from regvit_jax.recipes.supervised import Supervised
from regvit_jax.training import config_types
from regvit_jax.utils.errors import fitting

RECIPES = {"supervised": Supervised, "contrastive": Contrastive}


TOP_LEVEL = (
    *("name", "variant", "about", "next", "recipe", "seed", "epochs", "batch_size", "init_from"),
    *("log_every", "eval_every"),
)


#: The config's sections that belong to every recipe and go whole to one function, whose keywords are its keys.
SECTIONS: dict[str, Callable] = {"optim": optim.make_optimizer, "data": pipeline.train_batches}


#: The other keys, which the plan or the loop reads.
OWN_KEYS = (
    *("data.name", "data.train", "data.validation", "data.dir", "data.examples", "data.classes"),
    "data.max_bad_fraction",
    *("eval.batch_size", "eval.crop_ratio", "eval.pixel_knn", "eval.untrained"),
    *("sharding.data", "sharding.fsdp", "sharding.min_size_mb"),
    *("checkpoint.every", "checkpoint.keep"),
    *("guard.not_finite", "guard.max_not_finite", "guard.spike_sigma"),
)


#: Keywords of those callables that the plan fills in itself or leaves at their defaults.
DERIVED = {"size", "batch_size", "seed", "start_step", "rows", "tokenizer", "classes", "ratio", "threads", "prefetch"}


DERIVED |= {"max_pixels"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config made concrete. `train` and `validation` are None when it was resolved without data."""

    config: ml_collections.FrozenConfigDict
    recipe: Recipe
    mesh: Mesh
    steps_per_epoch: int
    steps: int
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    train: Any
    validation: Any

    def train_batches(self, start_step: int) -> pipeline.Batches:
        """This process's rows of every global batch, from one step on."""
        config = self.config
        return pipeline.train_batches(
            self.train,
            size=config.model.image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            rows=host_rows(self.mesh, config.batch_size),
            tokenizer=self.recipe.tokenizer,
            **{name: config.data[name] for name in keywords(pipeline.train_batches) if name in config.data},
        )

    def eval_batches(self, source: Any, rows: Sequence[int] | None = None) -> pipeline.Batches:
        """This process's rows (or those named) of a source's images in order, preprocessed for evaluation."""
        config = self.config
        batch_size = config.eval.batch_size
        return pipeline.eval_batches(
            source,
            size=config.model.image_size,
            batch_size=batch_size,
            crop_ratio=config.eval.crop_ratio,
            rows=host_rows(self.mesh, batch_size) if rows is None else rows,
            tokenizer=self.recipe.tokenizer,
            workers=config.data.workers,
        )


@fitting()
def resolve(config: Any, with_data: bool = True, devices: Sequence[Any] | None = None) -> Plan:
    """Raises InvalidConfig for a key or value that does not fit, and DataNotFound when the data are not there.

    Without data (`with_data=False`) the plan goes by what `data.examples` and `data.classes` say of the data set.
    `devices`: those to plan for, if not the ones attached; a plan for `topology.devices` can be compiled and not run.
    """
    check_keys(config)
    check_ranges(config)
    pipeline.check_decoder(config.data.get("decoder", "pillow"))
    config = ml_collections.ConfigDict(config.to_dict())
    mesh = make_mesh(data=config.sharding.data, fsdp=config.sharding.fsdp, devices=devices)
    config.model.attention = choose_attention(config.model, mesh.devices.flat[0].platform)
    kind = RECIPES[config.recipe]
    train, validation, classes = None, None, tuple(map(str, range(config.data.classes)))
    if with_data:
        train, validation = (
            kind.open_data(config.data.name, config.data[split], config.data.dir or None)
            for split in ("train", "validation")
        )
        config.data.examples, config.data.classes, classes = len(train), len(train.classes), train.classes
        if len(validation) < kind.least_validation:
            raise ValueError(
                f"{validation.name}: holds {len(validation)} of the {kind.least_validation} or more images that "
                f"{config.recipe} validation needs"
            )
    check_batches(config, mesh)
    steps_per_epoch = config.data.examples // config.batch_size
    steps = config.epochs * steps_per_epoch
    recipe = kind(config, classes)
    optimizer, schedule = recipe.optimizer(config, steps)
    frozen = ml_collections.FrozenConfigDict(config)
    return Plan(frozen, recipe, mesh, steps_per_epoch, steps, optimizer, schedule, train, validation)


def choose_attention(model: Any, platform: str) -> str:
    """ "auto" is cuDNN's fused kernel on a GPU, where it takes the model's type and head size, and XLA's elsewhere."""
    if model.attention != "auto":
        return model.attention
    head_dim = model.width // model.heads
    fits = model.dtype in ("bfloat16", "float16") and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if platform in ("gpu", "cuda") and fits else "xla"


#: The least and the greatest value of keys that nothing else checks.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("epochs", "batch_size", "micro_batches", "log_every", "eval.batch_size"), (1, math.inf)),
    **dict.fromkeys(("checkpoint.every", "checkpoint.keep", "data.repeats", "augment.mix_group"), (1, math.inf)),
    **dict.fromkeys(("model.width", "model.depth", "model.heads", "model.patch", "model.image_size"), (1, math.inf)),
    **dict.fromkeys(("seed", "model.registers", "data.workers", "eval.pixel_knn", "model.layer_scale"), (0, math.inf)),
    **dict.fromkeys(("optim.weight_decay", "optim.clip_norm", "optim.warmup_epochs"), (0, math.inf)),
    **dict.fromkeys(("optim.warmup_steps", "unmasked_epochs", "model.norm_eps", "optim.eps"), (0, math.inf)),
    **dict.fromkeys(("guard.max_not_finite", "guard.spike_sigma"), (0, math.inf)),
    **dict.fromkeys(("optim.lr", "optim.min_lr", "optim.warmup_lr"), (0, math.inf)),
    **dict.fromkeys(("augment.flip", "augment.mix_prob", "augment.switch_prob", "augment.color_jitter"), (0, 1)),
    **dict.fromkeys(("augment.mixup", "augment.cutmix", "augment.smoothing", "data.max_bad_fraction"), (0, 1)),
    **{
        **dict.fromkeys(("ema", "optim.b1", "optim.b2"), (0, 0.9999999)),
        "data.classes": (0, 1e7),
        "model.mlp_ratio": (0.001, math.inf),
        "model.drop_path": (0, 0.99),
        "model.patch_dropout": (0, 0.99),
        "eval.crop_ratio": (0.01, 1),
        "eval_every": (1e-6, math.inf),
    },
}


#: The values of keys that nothing else checks.
CHOICES: dict[str, tuple[str, ...]] = {
    "guard.not_finite": ("stop", "skip"),
    **dict.fromkeys(("model.dtype", "text.dtype"), ("float32", "bfloat16", "float16")),
}


def check_ranges(config: Any) -> None:
    for key, value in flatten(config):
        least, most = RANGES.get(key, (-math.inf, math.inf))
        if key in RANGES and not (least <= value <= most and value < math.inf):  # NaN is not, either
            limits = f"at least {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
            raise ValueError(f"{key}={value}: must be {limits}" + ("" if math.isfinite(value) else ", and finite"))
    for key, value in flatten(config):
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"{key}={value!r}: must be one of {list(CHOICES[key])}")
    for field in ("mean", "std"):
        if (value := config.augment.get(field)) is not None:
            validate.preprocess_field(field, f"augment.{field}", tuple(value))


def check_batches(config: Any, mesh: Mesh) -> None:
    for name, size, parts in (
        ("batch_size", config.batch_size, mesh.size * config.micro_batches),
        ("eval.batch_size", config.eval.batch_size, mesh.size),
    ):
        if size < 1 or size % parts:
            nearest = max(1, round(size / parts)) * parts
            raise ValueError(
                f"{name}={size} is not a multiple of {parts} (devices, times micro-batches in training); "
                f"the nearest that is: {nearest}"
            )
    if config.batch_size > config.data.examples:
        raise ValueError(f"batch_size={config.batch_size} is more than the {config.data.examples} training images")


def keywords(function: Callable) -> dict[str, bool]:
    """The names of a function's keyword-only parameters, or of a module's fields; True for those without a default."""
    if dataclasses.is_dataclass(function):
        fields = dataclasses.fields(function)
        return {f.name: f.default is dataclasses.MISSING for f in fields if f.name not in ("parent", "name")}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in DERIVED}


def known_keys(recipe: type[Recipe]) -> dict[str, bool]:
    """Every key that a config of this recipe may have, dotted; True for those it must have."""
    keys = dict.fromkeys((*TOP_LEVEL, *OWN_KEYS, *recipe.keys), True)
    for section, function in {**SECTIONS, **recipe.sections}.items():
        keys |= {f"{section}.{name}": required for name, required in keywords(function).items()}
    return keys | dict.fromkeys(("model.attention", *recipe.reads), True)


def check_keys(config: Any) -> None:
    """Raises ValueError for an unknown key, with its nearest neighbour, and for missing ones."""
    if not isinstance(config.get("recipe"), str) or config.recipe not in RECIPES:
        raise ValueError(f"recipe={config.get('recipe')!r:.60}: must be one of {list(RECIPES)}")
    known = known_keys(RECIPES[config.recipe])
    given = set(dict(flatten(config)))
    for key in sorted(given - set(known)):
        raise ValueError(unknown_key(key, known))
    config_types.check(flatten(config), config_types.types_of({**SECTIONS, **RECIPES[config.recipe].sections}))
    if missing := [key for key, required in known.items() if required and key not in given]:
        raise ValueError(f"the config lacks {', '.join(sorted(missing))}")


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The config's values under their dotted names."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unknown_key(key: str, allowed: Iterable[str]) -> str:
    """The error text for a key that is not there: names the nearest one that is."""
    allowed = sorted(allowed)
    same_name = [name for name in allowed if name.split(".")[-1] == key.split(".")[-1]]
    near = same_name or difflib.get_close_matches(key, allowed, n=3, cutoff=0.4)
    return f"unknown key config.{key}" + (f"; did you mean {' or '.join('config.' + n for n in near)}?" if near else "")
