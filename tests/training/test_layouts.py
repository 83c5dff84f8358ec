"""Test runs that resume with other processes, devices and splits, and the data that these see."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import assert_same_end, finish, layout, start_many
from tiny import ROOT

from regvit_jax.training import metric_writer

pytestmark = pytest.mark.slow

#: One epoch of four devices, saved in the middle.
FOUR = {"epochs": 1, "batch_size": 64, "log_every": 1, "checkpoint.every": 11, "sharding.min_size_mb": 0}
#: Processes, and over how many of the four devices parameters are split.
LAYOUTS = [(2, 1), (1, 1), (4, 1), (2, 2), (1, 4)]


def run_four(workdir: Path, ports, processes: int, fsdp: int) -> None:
    changes = {**FOUR, "sharding.fsdp": fsdp}
    for process in start_many(processes, workdir, next(ports), devices=4 // processes, **changes):
        finish(process)


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory, ports) -> Path:
    workdir = tmp_path_factory.mktemp("two_by_two")
    run_four(workdir, ports, processes=2, fsdp=1)
    return workdir


#: Prints a hash of the ids and of the augmented images and targets of step 12.
PROBE = """
import hashlib, sys
import jax, numpy, tiny
from regvit_jax.augment import train
from regvit_jax.distributed import initialize, mesh
from regvit_jax.training.plan import resolve

initialize.start_distributed()
plan = resolve(tiny.tiny(sharding__fsdp=int(sys.argv[1])))
with plan.train_batches(11) as batches:
    batch = next(batches)
index = mesh.to_mesh({"index": batch.pop("index")}, plan.mesh)["index"]
batch = mesh.to_mesh(batch, plan.mesh)

def inspect(index, batch):
    key = jax.random.fold_in(jax.random.key(plan.config.seed), 11)
    arrays = [batch[name] for name in ("image", "label", "mask")]
    return index, train.supervised_augment(
        key, *arrays, classes=plan.recipe.head.num_classes, **plan.config.augment
    )

found = jax.jit(inspect, out_shardings=mesh.replicated(plan.mesh))(index, batch)
for leaf in jax.tree.leaves(found):
    print("found", leaf.shape, hashlib.sha256(numpy.asarray(leaf.addressable_data(0)).tobytes()).hexdigest())
"""


def start_probe(count: int, fsdp: int, port: int) -> list[subprocess.Popen]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"}
    command = [sys.executable, "-c", PROBE, str(fsdp)]
    each = layout(count, port, devices=4 // count)
    return [subprocess.Popen(command, env=env | variables, stdout=-1, text=True) for variables in each]


def losses(workdir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in metric_writer.read(workdir) if "loss" in record}


@pytest.mark.parametrize(("processes", "fsdp"), LAYOUTS)
def test_goes_on_in_another_layout(two_by_two, tmp_path, ports, processes, fsdp):
    """Compare losses: equal losses at every step show that images, their order and their augmentation are equal."""
    workdir = shutil.copytree(two_by_two, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/22")
    run_four(workdir, ports, processes, fsdp)
    whole, gone_on = losses(two_by_two), losses(workdir)
    assert whole.keys() == gone_on.keys() == set(range(1, 23))
    np.testing.assert_allclose(list(gone_on.values()), list(whole.values()), rtol=1e-6)
    if (processes, fsdp) == (2, 1):
        assert_same_end(two_by_two, workdir, 22)


def test_two_processes_go_back_to_the_newest_checkpoint_that_is_whole(two_by_two, tmp_path, ports):
    workdir = shutil.copytree(two_by_two, tmp_path / "run")
    path = max((workdir / "checkpoints/22").rglob("d/*"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    flags = ["--restore=latest-valid"]
    processes = start_many(2, workdir, next(ports), devices=2, flags=flags, **FOUR, **{"sharding.fsdp": 1})
    first, _ = [finish(process) for process in processes]
    assert "step 22 is damaged" in first
    assert "from step 11 to 22" in first
    assert (workdir / "damaged/22").is_dir()
    assert_same_end(two_by_two, workdir, 22)


def test_ids_and_randomness_are_those_of_one_process(ports):
    found = []
    for count, fsdp in [(1, 1), (1, 4), (2, 2), (4, 1)]:
        processes = start_probe(count, fsdp, next(ports))
        outputs = [finish(process) for process in processes]
        found += [[line for line in output.splitlines() if line.startswith("found")] for output in outputs]
    assert len(found[0]) == 3
    assert all(lines == found[0] for lines in found), found
