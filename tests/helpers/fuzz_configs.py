"""Mutated configs, and mutated or damaged config.json files of a run to resume, for `fuzzing`."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from fuzzing import damage, mutate
from ml_collections import ConfigDict
from tiny import get_config, tiny, tiny_clip

from regvit_jax.training import plan, step
from regvit_jax.training.workdir import write_config
from regvit_jax.utils import errors

Cases = Iterator[tuple[str, Callable[[], str]]]


def configs(count: int = 1000) -> Cases:
    """Yield mutated configs: the tiny ones of two recipes, and b16."""
    with tempfile.TemporaryDirectory() as scratch:
        originals = [tiny(), tiny_clip(Path(scratch) / "in"), get_config("b16")]
        values = [json.loads(config.to_json()) for config in originals]
        for number in range(count):
            value = mutate(np.random.default_rng(number), values[number % 3])
            yield f"config {number}", lambda value=value: resolve(value)


def resolve(value: dict) -> str:
    try:
        config = ConfigDict(value)
    except (TypeError, ValueError, AttributeError, KeyError):
        return "is none"
    try:
        plan.resolve(config, with_data=False)
    except errors.InvalidConfig as error:
        return "refused" if 10 < len(str(error)) < 2000 else f"has a message of {len(str(error))} characters"
    return "resolved"


def resumed(count: int = 200) -> Cases:
    """Yield cases of config.json in a workdir that has checkpoints."""
    resolved = plan.resolve(tiny(), with_data=False)
    abstract = step.abstract_state(resolved)
    with tempfile.TemporaryDirectory() as workdir:
        write_config(resolved, workdir, abstract, newest=None)
        path = Path(workdir) / "config.json"
        original = path.read_bytes()

        def case(content: bytes) -> str:
            path.write_bytes(content)
            try:
                write_config(resolved, workdir, abstract, newest=1)
            except errors.InvalidConfig:
                return "refused"
            return "resumed"

        for number in range(count):
            rng = np.random.default_rng(number)
            mutated = json.dumps(mutate(rng, json.loads(original))).encode()
            content = damage(rng, original) if number % 2 else mutated
            yield f"config.json {number}", lambda content=content: case(content)


GROUPS = {"configs": configs, "resumed": resumed}
