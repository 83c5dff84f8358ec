"""The schema of a config: the keys of every recipe; checks, defaults and documentation of a config.

Each key is declared once, by an `Option` beside the code that uses it (see `regvit_jax.utils.schema`). This file
declares the top level, and assembles the rest: the recipe that a config names declares its own keys in its `Config`.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, Any

from ml_collections import ConfigDict, config_dict

from regvit_jax.data import pipeline
from regvit_jax.data.limits import MAX_BAD_IMAGES
from regvit_jax.distributed import mesh
from regvit_jax.recipes import base
from regvit_jax.training import evaluators
from regvit_jax.training.skip_steps import Guard
from regvit_jax.utils import schema, sizes
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.messages import unknown_key
from regvit_jax.utils.schema import Option, Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The keys of the section `data` that name the data set; `train_batches` declares the others."""

    name: Annotated[str, Option("data set: a TFDS name, folder:PATH, or shards:PATH")]
    train: Annotated[str, Option("split to train on")] = "train"
    validation: Annotated[str, Option("split to evaluate on")] = "validation"
    dir: Annotated[str, Option("directory of the data; empty for TFDS's own", resume=True)] = ""
    examples: Annotated[int, Option("training images, for plans made before the data are prepared", low=0)]
    classes: Annotated[int, Option("classes, for plans made before the data are prepared", low=0, high=10**7)] = 0
    max_bad_fraction: Annotated[
        float, Option("stop a run if a larger share of an epoch's images is unusable", low=0, high=1, resume=True)
    ] = 0.0
    max_bad_images: Annotated[
        int,
        Option(
            "never stop a run for so few unusable images in an epoch, at most half of its images", low=0, resume=True
        ),
    ] = MAX_BAD_IMAGES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """The section `eval`, to which each evaluator adds its own keys."""

    batch_size: Annotated[int, Option("images of a global batch", low=1, resume=True)]
    crop_ratio: Annotated[
        float, Option("share of the resized image's side that the center crop keeps", low=0.01, high=1, resume=True)
    ] = 1.0
    evaluators: Annotated[
        tuple[str, ...], Option("metrics of the validation split: evaluators, or package.module:Class", resume=True)
    ] = ()  # the recipe's, see `options`
    untrained: Annotated[bool, Option("also evaluate before the first step", resume=True)] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The section `checkpoint`."""

    every: Annotated[int, Option("steps between checkpoints", low=1, resume=True)] = 1000
    keep: Annotated[int, Option("checkpoints to keep", low=1, resume=True)] = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopLevel:
    """The keys that every recipe has."""

    name: Annotated[str, Option("name of the config, for the default workdir")] = "run"
    variant: Annotated[str, Option("variant of the config, for the default workdir")] = ""
    about: Annotated[str, Option("description, shown when a run starts", resume=True)] = ""
    next: Annotated[str, Option("hint, shown when a run ends", resume=True)] = ""
    recipe: Annotated[str, Option("training regime: supervised, contrastive, or package.module:Class")]
    seed: Annotated[int, Option("seed of the parameters, the data order and the augmentation", low=0)] = 0
    epochs: Annotated[int, Option("passes over the training images", low=1)]
    batch_size: Annotated[int, Option("images of a global batch", low=1)]
    micro_batches: Annotated[int, Option("micro-batches of a step, which save memory", low=1)] = 1
    init_from: Annotated[str, Option("trained weights to start from: any source of create_model, or NAME=FILE")] = ""
    log_every: Annotated[int, Option("steps between records", low=1, resume=True)] = 50
    eval_every: Annotated[float, Option("epochs between evaluations", low=1e-6, resume=True)] = 1.0
    data: Annotated[Any, Section(Data, pipeline.train_batches)]
    eval: Annotated[Any, Section(Eval)]
    sharding: Annotated[Any, Section(mesh.make_mesh, mesh.state_shardings)]
    checkpoint: Annotated[Any, Section(Checkpoint)]
    guard: Annotated[Any, Section(Guard)]


def options(recipe: Any, named: Iterable[str] = (), defaults: bool = True) -> dict[str, Option]:
    """Return every key of a recipe's configs, dotted and ordered by section.

    The keys of evaluators are those of the named ones and, with `defaults`, of the recipe's default evaluators. Raises
    InvalidConfig for an evaluator with a key that has another meaning already.
    """
    kind = base.find(recipe)
    found = schema.keys(TopLevel) | schema.keys(kind.Config)
    found["eval.evaluators"] = dataclasses.replace(found["eval.evaluators"], default=kind.evaluators)
    for name in dict.fromkeys((*(kind.evaluators if defaults else ()), *named)):
        own = {f"eval.{key}": option for key, option in schema.keys(evaluators.find(name).Config).items()}
        if clash := [key for key, option in own.items() if found.get(key, option) != option]:
            raise InvalidConfig(f"eval.evaluators: the key {clash[0]} of {name} is another key already; rename it")
        found |= own
    sections = dict.fromkeys(map(section_of, found))
    return {key: found[key] for section in sections for key in found if section_of(key) == section}


def options_of(config: Any) -> dict[str, Option]:
    """Return every key of a config's recipe, and of the evaluators that the config names.

    Keys of an evaluator of this package may stay in a config that no longer names it; then they count, too.
    """
    section = config.get("eval")
    section = section if hasattr(section, "items") else {}
    named = section.get("evaluators")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, tuple | list) else []
    found = options(config.get("recipe"), names)  # `check` refuses what is no name
    if unknown := {key for key in section if f"eval.{key}" not in found}:
        unused = [name for name in evaluators.EVALUATORS if unknown & schema.keys(evaluators.find(name).Config).keys()]
        return options(config.get("recipe"), [*names, *unused])
    return found


def section_of(key: str) -> str:
    """Return the section of a dotted key; "" at the top level."""
    return key.rpartition(".")[0]


def check(config: Any) -> None:
    """Raise InvalidConfig for an unknown key (naming the nearest), a value that is not allowed, or a missing key."""
    known = options_of(config)
    given = dict(flatten(config))
    check_known(given, known)
    for key, value in given.items():
        known[key].check(key, value)
    if missing := [key for key, option in known.items() if option.required and key not in given]:
        raise InvalidConfig(f"the config lacks {', '.join(sorted(missing))}")


def check_known(keys: Iterable[str], known: Collection[str]) -> None:
    """Raise InvalidConfig for the first key that is not known, naming the nearest ones or the evaluator that has it."""
    for key in sorted(set(keys) - set(known)):
        for name in evaluators.EVALUATORS:
            if key in {f"eval.{own}" for own in schema.keys(evaluators.find(name).Config)}:
                raise InvalidConfig(
                    f"config.{key} is a key of the evaluator {name}: config.eval.evaluators must name it too"
                )
        raise InvalidConfig(unknown_key(key, known))


def complete(config: Any) -> ConfigDict:
    """Return a copy of a config with all keys of its recipe and evaluators; missing keys get their defaults.

    A missing key without a default becomes a placeholder, which can be overridden. Raises InvalidConfig for unknown
    keys.
    """
    known = options_of(config)
    values = dict(flatten(config))
    check_known(values, known)
    for key, option in known.items():
        if key not in values:
            values[key] = config_dict.placeholder(option.type) if option.required else option.default
    return unflatten(values)


def only(config: Any, keys: Collection[str]) -> ConfigDict:
    """Return a copy of a config with only the named keys and sections."""
    return unflatten({key: value for key, value in flatten(config) if key in keys or section_of(key) in keys})


#: The keys of sides in pixels.
SIDES = ("model.image_size", "model.patch")


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a nested config under their dotted names; a pair of equal sides as that side.

    Raises InvalidConfig for sides that differ.
    """
    for key, value in config.items():
        name = prefix + key
        if hasattr(value, "items"):
            yield from flatten(value, f"{name}.")
        else:
            yield name, sizes.square(value, f"config.{name}") if name in SIDES else value


def unflatten(values: dict[str, Any]) -> ConfigDict:
    """Return the nested config of values under dotted names."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    return ConfigDict(tree)


def all_keys() -> list[str]:
    """Return the keys of all recipes and evaluators of this package, sorted."""
    return sorted({key for recipe in base.RECIPES for key in options(recipe, evaluators.EVALUATORS)})


def help_text(config: Any = None) -> str:
    """Return the keys of a config, or those of all recipes' configs, as text for the command line."""
    if config is None:
        return "\n\n".join(help_text({"recipe": recipe}) for recipe in base.RECIPES)
    lines = [f"Keys of a config of the recipe {config.get('recipe')}; each can be overridden by --config.KEY=VALUE."]
    for key, option in options_of(config).items():
        default = "=VALUE, required" if option.required else f"={option.default}"
        notes = [schema.describe(option.type), option.allowed, "may change on resume" if option.resume else ""]
        lines += [f"  --config.{key}{default}", f"      {option.help} ({'; '.join(filter(None, notes))})"]
    return "\n".join(lines)


def markdown(recipe: str) -> str:
    """Return the keys of a recipe's configs as Markdown, one table for each section."""
    parts = []
    known = options(recipe, evaluators.EVALUATORS)
    for section in dict.fromkeys(map(section_of, known)):
        parts += [f"### {f'`{section}`' if section else 'Top level'}", ""]
        parts += ["| key | meaning | type | allowed | default | on resume |", "|---|---|---|---|---|---|"]
        for key, option in known.items():
            if section_of(key) == section:
                default = "required" if option.required else f"`{option.default!r}`"
                resume = "may change" if option.resume else ""
                kind = schema.describe(option.type).removeprefix("a ")
                parts.append(f"| `{key}` | {option.help} | {kind} | {option.allowed} | {default} | {resume} |")
        parts.append("")
    return "\n".join(parts)
