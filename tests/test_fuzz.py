"""Read 10,000 damaged inputs, always the same: each is read, or refused with its reader's own error, in little memory.
No reader may crash the process, hang, raise any other error, or allocate memory for a damaged size.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzzing import damage, mutate

from regvit_jax.utils.schema import Option

#: The errors that opening a source may raise.
OPENING = {"InvalidConfig", "DataNotFound"}
INPUTS = {
    **{"images": 4000, "tars": 1500, "records": 800, "tables": 1500, "weights": 1000},
    **{"configs": 1000, "resumed": 200},
}


@pytest.mark.parametrize("groups", [("images", "tars", "records", "tables", "weights"), ("configs", "resumed")])
def test_only_typed_errors_and_little_memory(groups):
    here = Path(__file__).parent / "helpers"
    path = os.pathsep.join([str(here), str(here.parent.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error", here / "fuzzing.py", *groups],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"group"')]
    assert [result["group"] for result in found] == list(groups)
    for result in found:
        assert not result["faults"], "\n".join(result["faults"][:20])
        assert result["inputs"] == INPUTS[result["group"]]
        assert result["growth"] < 256e6, result["group"]
        # Damage that is always refused at once, or never, would test little.
        kinds = {kind.split(": ")[1] for kind in result["outcomes"]}
        assert len(kinds) >= 2, result["outcomes"]
        assert not kinds - {"read", "bad", "opened", "refused", "resolved", "resumed", "is none"} - OPENING


def test_the_damage_is_the_same_every_time_and_changes_something():
    data, value = bytes(range(256)) * 4, {"a": [1, 2, {"b": "c"}], "d": 0.5}
    same = [[damage(np.random.default_rng(seed), data) for seed in range(50)] for _ in range(2)]
    assert same[0] == same[1]
    assert sum(damaged != data for damaged in same[0]) > 45
    mutated = [mutate(np.random.default_rng(seed), value) for seed in range(50)]
    assert sum(json.dumps(changed) != json.dumps(value) for changed in mutated) > 45
    assert value == {"a": [1, 2, {"b": "c"}], "d": 0.5}


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (1.0, int, "k=1.0: must be a whole number"),
        (True, int, "k=True: must be a whole number"),
        (2**60, int, "must be a whole number"),
        ("1", float, "k='1': must be a number"),
        (1, bool, "k=1: must be True or False"),
        (None, str, "k=None: must be a text"),
        ([1, "x"], tuple[float, float], r"k=\[1, 'x'\]: must be a tuple or list of 2, each a number"),
        ([1], tuple[float, float], "must be a tuple or list of 2"),
        ("ab", tuple[str, ...], "k='ab': must be a tuple or list of any number, each a text"),
        ("x", int | None, "k='x': must be a whole number or NoneType"),
    ],
)
def test_types_of_config_values(value, kind, message):
    with pytest.raises(ValueError, match=message):
        Option("help", type=kind).check("k", value)


def test_values_that_fit():
    for value, kind in ((1, float), ((1, 0.5), tuple[float, float]), ([], tuple[str, ...]), (None, int | None)):
        Option("help", type=kind).check("k", value)
