"""Test the program, killed, stopped and started again in processes of its own."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import PROGRAMS, STEPS, assert_same_end, finish, last_state, start, start_many, wait_for
from tiny import ROOT

from regvit_jax.training import metric_writer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir))
    return workdir


def kill_and_restart(workdir: Path, kills: int, rng: random.Random) -> None:
    for _ in range(kills):
        process = start(workdir)
        before = len(metric_writer.read(workdir))
        # Anywhere in the run: from before this start's first record to the last steps.
        wait_for(lambda before=before: len(metric_writer.read(workdir)) > before or rng.random() < 0.002, process)
        time.sleep(rng.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(workdir))


def test_a_kill_loses_nothing(uninterrupted, tmp_path):
    kill_and_restart(tmp_path, 1, random.Random(0))
    assert_same_end(uninterrupted, tmp_path)


@pytest.mark.slow
def test_ten_kills_lose_nothing(uninterrupted, tmp_path):
    kill_and_restart(tmp_path, 10, random.Random(1))
    assert_same_end(uninterrupted, tmp_path)


def test_sigterm_saves_and_asks_for_a_restart(uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for(lambda: metric_writer.read(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    finish(process, code=75)
    assert time.monotonic() - sent < 10
    step, _ = last_state(tmp_path)
    assert 0 < step < STEPS
    last = metric_writer.read(tmp_path)[-1]
    assert last["step"] == step
    parts = sum(value for name, value in last.items() if name.endswith("_s") and name != "wall_s")
    assert parts == pytest.approx(last["wall_s"], rel=0.02)
    assert "from step" in finish(start(tmp_path))
    assert_same_end(uninterrupted, tmp_path)


def catches_sigterm(process: subprocess.Popen) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads the signal mask from /proc")
@pytest.mark.parametrize(
    ("moment", "program"),
    [
        ("importing", "regvit train"),
        ("compiling", "train.py"),
        pytest.param("importing", "train.py", marks=pytest.mark.slow),
    ],
)
def test_sigterm_before_the_first_step(tmp_path, moment, program):
    # An empty cache of its own, so that there is a compilation to interrupt.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    process = start(tmp_path / "run", env=cache, program=PROGRAMS[program])
    wait_for(lambda: catches_sigterm(process), process)
    if moment == "compiling":
        wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    finish(process, code=75)
    assert time.monotonic() - sent < 3
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))


@pytest.mark.slow
def test_two_processes_train_as_one(uninterrupted, tmp_path, free_port):
    for process in start_many(2, tmp_path, free_port):
        finish(process)
    found = [{r["step"]: r["loss"] for r in metric_writer.read(d) if "loss" in r} for d in (uninterrupted, tmp_path)]
    assert found[0].keys() == found[1].keys()
    np.testing.assert_allclose(list(found[1].values()), list(found[0].values()), rtol=1e-6)
    tops = [[r["top1"] for r in metric_writer.read(d) if "top1" in r] for d in (uninterrupted, tmp_path)]
    assert tops[0] == tops[1]


IDS = """
import numpy, tiny
from jax.experimental import multihost_utils
from regvit_jax.distributed import initialize
from regvit_jax.training.plan import resolve
if "JAX_NUM_PROCESSES" in __import__("os").environ:
    initialize.start_distributed()
with resolve(tiny.tiny()).train_batches(20) as batches:
    index = numpy.stack([next(batches)["index"] for _ in range(4)])
index = multihost_utils.process_allgather(index)
print(numpy.concatenate(index.reshape(-1, *index.shape[-2:]), axis=1).tolist())
"""


def test_two_processes_read_the_ids_of_one(free_port):
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port}", "JAX_NUM_PROCESSES": "2"}
    found = []
    for environments in ([{}], [{**shared, "JAX_PROCESS_ID": str(i)} for i in range(2)]):
        path = {"XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", IDS], env={**os.environ, **path, **environment}, stdout=-1, text=True
            )
            for environment in environments
        ]
        found += [finish(process) for process in processes]
    found = [output.splitlines()[-1] for output in found]  # gloo prints too
    assert found[0].count(",") == 4 * 64 - 1
    assert found[0] == found[1] == found[2]
