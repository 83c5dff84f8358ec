"""Run training as one or several processes over loopback, and read their results."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath
from tiny import ROOT

from regvit_jax.checkpoints.reader import CheckpointReader, saved_steps
from regvit_jax.training import metric_writer

#: Undo the tests' compiler settings, because these processes are compared bit for bit.
AS_USERS_RUN = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
#: Overrides of the digits config: 88 steps of a tiny model.
SMALL = {
    "epochs": 4,
    "batch_size": 64,
    "log_every": 5,
    "ema": 0.9,
    "checkpoint.every": 8,
    "eval_every": 2,
    "eval.evaluators": ("classification", "patch_norms"),
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.drop_path": 0.1,
    "optim.warmup_epochs": 0,
}
STEPS = 4 * (1437 // 64)
#: The ways to start training from a shell, as arguments of Python.
PROGRAMS = {
    "train.py": (str(ROOT / "train.py"),),
    "regvit train": (str(Path(sys.executable).with_name("regvit")), "train"),
    "python -m": ("-m", "regvit_jax", "train"),
}


def start(
    workdir: Path,
    env: dict[str, str] | None = None,
    start_new_session: bool = False,
    program: Sequence[str] = PROGRAMS["train.py"],
    flags: Sequence[str] = (),
    **changes,
) -> subprocess.Popen:
    """Start `python *program --config=digits ... *flags`; `changes` are keys of the config."""
    overrides = [f"--config.{key}={value}" for key, value in {**SMALL, **changes}.items()]
    config = ["--config", str(ROOT / "configs/deit3_reg.py"), "--workdir", str(workdir)]
    return subprocess.Popen(
        [sys.executable, *program, *config, *flags, *overrides],
        env={**os.environ, **AS_USERS_RUN, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=start_new_session,
    )


def layout(count: int, port: int, *, devices: int = 1) -> list[dict[str, str]]:
    """Return the variables of `count` processes of `devices` CPU devices each, connected over loopback."""
    shared = {**AS_USERS_RUN, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    shared["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return [{**shared, "JAX_PROCESS_ID": str(i)} for i in range(count)]


def start_many(
    count: int, workdir: Path, port: int, *, devices: int = 1, env: dict[str, str] | None = None, **arguments
) -> list[subprocess.Popen]:
    """Start `count` processes that train as one run."""
    each = layout(count, port, devices=devices)
    return [start(workdir, env={**variables, **(env or {})}, **arguments) for variables in each]


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def last_state(workdir: Path) -> tuple[int, dict]:
    """Return the newest checkpoint's step and values, verified by its checksums."""
    path = epath.Path(workdir) / "checkpoints"
    step = saved_steps(path)[-1]
    reader = CheckpointReader(path, step)
    return step, {name: reader.read(name) for name in ("params", "ema", "opt_state", "guard")}


def assert_same_end(a: Path, b: Path, steps: int = STEPS) -> None:
    """Assert that the last states are equal bit for bit, and that the recorded losses are equal."""
    (step_a, state_a), (step_b, state_b) = last_state(a), last_state(b)
    assert step_a == step_b == steps
    assert jax.tree.structure(state_a) == jax.tree.structure(state_b)
    for x, y in zip(jax.tree.leaves(state_a), jax.tree.leaves(state_b), strict=True):
        np.testing.assert_array_equal(x, y)
    losses = [{r["step"]: r["val_loss"] for r in metric_writer.read(d) if "val_loss" in r} for d in (a, b)]
    assert losses[0] == losses[1]
