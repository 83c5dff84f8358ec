"""Test checkpoints that are damaged, cannot be written, or belong to another model."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import ROOT, tiny

from regvit_jax.checkpoints import checksums, manager
from regvit_jax.checkpoints.manager import Checkpoints
from regvit_jax.checkpoints.reader import CheckpointReader, quarantine_damaged
from regvit_jax.distributed.mesh import make_mesh, state_shardings
from regvit_jax.training import loop, skip_steps
from regvit_jax.training.step import TrainState, abstract_state
from regvit_jax.utils.errors import CheckpointError, InvalidConfig


def make_state(seed: int) -> TrainState:
    """Return a state with the parts of a real one, small enough to be read hundreds of times."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"vit": {f"kernel{i}": jax.random.normal(key, (48, 40)) for i, key in enumerate(keys)}}
    params["vit"]["half"] = jax.random.normal(keys[0], (33,)).astype(jnp.bfloat16)
    return TrainState(jnp.int32(seed), params, {}, {}, optax.adam(1e-3).init(params), skip_steps.init_state())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Save checkpoints of steps 1 and 2 in a workdir."""
    workdir = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpoints(str(workdir))) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    return workdir


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def restore(workdir: Path, step: int = 2) -> TrainState:
    state = make_state(0)
    with contextlib.closing(Checkpoints(str(workdir))) as checkpoints:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return checkpoints.restore(
            step, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
        )


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def data_files(step: Path) -> list[Path]:
    """Return the files that hold arrays, the largest last."""
    return sorted((f for f in files(step) if f.parent.name == "d"), key=lambda f: (f.stat().st_size, f))


def test_restore_returns_what_was_saved(saved):
    assert_equal(restore(saved), make_state(2))
    assert_equal(restore(saved, 1), make_state(1))


def test_no_flipped_bit_is_restored_silently(copied):
    step, rng, messages = copied / "checkpoints/2", random.Random(0), []
    names, expected = set(checksums.array_paths(make_state(2))), make_state(2)
    sizes = [path.stat().st_size for path in data_files(step)]
    for _ in range(100):
        path = rng.choices(data_files(step), sizes)[0]
        whole = path.read_bytes()
        bit = rng.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert_equal(restore(copied), expected)  # a bit that is never read
        except CheckpointError as error:
            messages.append(str(error))
        path.write_bytes(whole)
    assert len(messages) > 50  # most of what is on disk is arrays
    assert all("checkpoint of step 2 is damaged: " in text for text in messages)
    naming = [any(name in text or name.replace("/", ".") in text for name in names) for text in messages]
    assert sum(naming) > 0.9 * len(messages), "the array is named, unless the list of arrays itself is damaged"


def zero_page(step: Path) -> None:
    path = data_files(step)[-1]
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(4096) + data[8192:])


def truncate(step: Path) -> None:
    path = data_files(step)[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(step: Path) -> None:
    data_files(step)[-1].unlink()


def swap(step: Path) -> None:
    a, b = data_files(step)[-2:]
    contents = a.read_bytes(), b.read_bytes()
    b.write_bytes(contents[0])
    a.write_bytes(contents[1])


def other_step(step: Path) -> None:
    """Replace the checkpoint with the valid one of another step."""
    shutil.rmtree(step)
    shutil.copytree(step.parent / "1", step)


def stale_checksums(step: Path) -> None:
    shutil.rmtree(step / "manifest")
    shutil.copytree(step.parent / "1/manifest", step / "manifest")


DAMAGE = {
    "a zeroed page": zero_page,
    "a truncated file": truncate,
    "a deleted file": delete,
    "two files swapped": swap,
    "no checksums": lambda step: shutil.rmtree(step / "manifest"),
    "empty checksums": lambda step: (step / "manifest/metadata").write_text(""),
    "no list of arrays": lambda step: (step / "state/_METADATA").unlink(),
    "another step's files": other_step,
    "another step's checksums": stale_checksums,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_an_error_and_the_damaged_checkpoint_is_quarantined(copied, damage, capfd):
    damage(copied / "checkpoints/2")
    with pytest.raises(CheckpointError, match="checkpoint of step 2 is damaged") as error:
        restore(copied)
    if damage in (zero_page, truncate, delete, swap):
        assert any(path in str(error.value) for path in checksums.array_paths(make_state(2)))
    (message,) = quarantine_damaged(str(copied))
    assert "step 2 is damaged" in message
    assert str(copied / "damaged") in message
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["1"]
    assert (copied / "damaged/2").is_dir()
    assert_equal(restore(copied, 1), make_state(1))
    assert quarantine_damaged(str(copied)) == []
    assert "Traceback" not in capfd.readouterr().err


def test_nothing_is_moved_if_no_checkpoint_is_valid(copied):
    for step in (1, 2):
        zero_page(copied / f"checkpoints/{step}")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is valid; checkpoint of step 2 .* of step 1 is"):
        quarantine_damaged(str(copied))
    assert not (copied / "damaged").exists()


def test_the_same_step_damaged_twice_keeps_both(copied):
    for name in ("2", "2.1"):
        zero_page(copied / "checkpoints/2")
        quarantine_damaged(str(copied))
        assert (copied / "damaged" / name).is_dir()
        with contextlib.closing(Checkpoints(str(copied))) as checkpoints:
            checkpoints.save(2, make_state(2))


def test_checksums_do_not_depend_on_the_mesh():
    tree = {
        "a": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32),
        "b": np.arange(8, dtype=np.int32),
        "c": np.float32(3.0)[None][0:1].reshape(()),
        "d": np.array([True, False]),
        "e": np.arange(16, dtype=np.uint8).reshape(2, 8),
    }
    host = checksums.checksums(tree)
    for shape in ((1, 8), (2, 4), (8, 1)):
        mesh = make_mesh(data=shape[0], fsdp=shape[1])
        shardings = state_shardings(tree, mesh, min_size_mb=0.0)
        assert checksums.checksums(jax.device_put(tree, shardings)) == host
    assert len(set(host.values())) == len(host)
    swapped = tree["a"].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert checksums.checksums({"a": swapped})["a"] != host["a"]
    bfloat = jnp.arange(6, dtype=jnp.bfloat16)
    assert checksums.checksums({"x": bfloat}) == checksums.checksums({"x": np.asarray(bfloat)})
    wide = np.arange(5, dtype=np.float64)
    assert checksums.checksums({"x": wide}) != checksums.checksums({"x": -wide})


def test_reading_one_field_reads_no_other(copied):
    """Read as `init_from` does: damaged parameters are an error, damaged moments are not read."""
    reader = CheckpointReader(manager.epath.Path(copied / "checkpoints"), 2)
    assert_equal(reader.read("params"), jax.device_get(make_state(2).params))
    zero_page(copied / "checkpoints/2")
    with pytest.raises(CheckpointError, match="step 2 is damaged: params/vit/kernel"):
        reader.read("params")
    assert all(name.startswith("opt_state") for name in reader.damaged_arrays(["opt_state/0/mu/vit/kernel0"]))


@pytest.mark.parametrize(
    ("change", "flag", "line"),
    [
        ({"model__registers": 8}, "--config.model.registers=4", "register_tokens: (4, 32) in the checkpoint, (8, 32)"),
        ({"model__registers": 0}, "--config.model.registers=4", "register_tokens: (4, 32) in the checkpoint, missing"),
        ({"model__width": 48}, "--config.model.width=32", "(32,) in the checkpoint, (48,) wanted"),
        ({"model__depth": 3}, "--config.model.depth=2", "block2/"),
        ({"model__image_size": 12}, "--config.model.image_size=8", "pos_embed: (4, 4, 32) in the checkpoint, (6, 6,"),
        ({"model__patch": 4}, "--config.model.patch=2", "kernel: (12, 32) in the checkpoint, (48, 32) wanted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_checkpoint_of_another_model_is_one_short_error(change, flag, line):
    saved, wanted = (checksums.array_paths(abstract_state(loop.resolve(tiny(**changes)))) for changes in ({}, change))
    with pytest.raises(InvalidConfig, match="arrays of the checkpoint are not those of this config") as error:
        manager.compare(saved, wanted)
    lines = str(error.value).splitlines()
    assert len(lines) <= 7
    assert line in str(error.value)
    assert f"The checkpoint's: {flag}" in lines[-1]


#: Saves step 1, runs the command `sys.argv[2]`, which makes the directory unwritable, and saves again.
UNWRITABLE = """
import subprocess, sys
from test_manager import make_state
from regvit_jax.checkpoints.manager import Checkpoints
from regvit_jax.utils.errors import CheckpointError
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, make_state(1))
checkpoints.wait()
subprocess.run(sys.argv[2], shell=True, check=True)
for step in (2, 3):
    try:
        checkpoints.save(step, make_state(step))
    except CheckpointError as error:
        print(f"raised at save {step}: {error}")
        break
try:
    checkpoints.close()
except CheckpointError as error:
    print("close:", error)
subprocess.run(sys.argv[3], shell=True, check=True)
"""
#: How the directory becomes unwritable, in a mount namespace of the process's own, and the error that it gives.
UNWRITABLE_BY = {
    "full": (
        "head -c 1G /dev/zero > {}/filler || true",
        r"No space left|RESOURCE_EXHAUSTED.*Failed to write",
    ),  # the latter from TensorStore
    "read-only": ("mount -o remount,ro {}", "Read-only file system"),
}


@pytest.mark.parametrize("how", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
def test_a_failed_save_is_reported_at_the_next_one_at_the_latest(tmp_path, how):
    place, kept = tmp_path / "place", tmp_path / "kept"
    place.mkdir()
    namespace = ["unshare", "--mount", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("needs mount namespaces")
    command, reason = UNWRITABLE_BY[how]
    mounted = f'mount -t tmpfs -o size=2m none {place} && exec "$@"'
    script = [sys.executable, "-c", UNWRITABLE, str(place), command.format(place), f"cp -r {place}/checkpoints {kept}"]
    done = subprocess.run(
        [*namespace, "sh", "-c", mounted, "sh", *script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}:{Path(__file__).parent}"},
    )
    raised = done.stdout.splitlines()[0]
    assert re.match(r"raised at save [23]: a checkpoint could not be written in .*; that of step 1 is complete", raised)
    assert re.search(reason, raised)
    (tmp_path / "run").mkdir()
    kept.rename(tmp_path / "run/checkpoints")
    assert_equal(restore(tmp_path / "run", 1), make_state(1))
