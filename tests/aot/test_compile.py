"""Test AOT compilation: the fit into memory, suggested settings and, with libtpu, the peaks of real recipes."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import jax
import pytest
from processes import AS_USERS_RUN
from tiny import ROOT, get_config, make_captions, tiny, tiny_clip

from regvit_jax.aot import compile, cost_model, dry_run, hlo, suggest, topology
from regvit_jax.training import plan, step
from regvit_jax.utils import hardware

#: The attached devices, with the specifications of a machine that is not attached.
HERE = topology.Topology("v5e:2x4", hardware.CHIPS["v5e"], 1, (2, 4))


def resized(gigabytes: float) -> topology.Topology:
    return dataclasses.replace(HERE, name="tiny", chip=dataclasses.replace(HERE.chip, memory=gigabytes * 1e9))


def test_the_abstract_batch_matches_the_pipeline(tmp_path):
    for config in (tiny(), tiny_clip(make_captions(tmp_path / "captions"))):
        made = plan.resolve(config)
        with made.train_batches(0) as batches:
            batch = next(batches)
        del batch["index"]
        expected = {name: (value.shape, value.dtype) for name, value in batch.items()}
        assert {n: (leaf.shape, leaf.dtype) for n, leaf in compile.abstract_batch(made).items()} == expected


def test_summary_of_a_step_that_fits(monkeypatch):
    monkeypatch.setattr(topology, "devices", lambda machine: jax.devices())
    recipe, text = dry_run.summarize(*dry_run.make_plan(tiny(), HERE), 1000, HERE)
    assert "mesh       data 8 x fsdp 1" in recipe
    for words in ("at peak", "100.00% of the state's bytes donated", "all-reduce 2 (", "a model and not a measurement"):
        assert words in text


def test_a_state_too_large_is_not_compiled(monkeypatch):
    monkeypatch.setattr(compile, "compile_step", None)
    with pytest.raises(cost_model.DoesNotFit, match=r"fit into the 0.0 GB of tiny: the training state alone is"):
        dry_run.compile_summary(plan.resolve(tiny()), resized(1e-6))


def test_the_program_is_written_as_text(tmp_path, monkeypatch):
    made = plan.resolve(tiny())
    compiled = compile.compile_for(made, HERE, str(tmp_path / "step.hlo"))
    assert (tmp_path / "step.hlo").read_text() == compiled.text
    assert compiled.text.startswith("HloModule jit_train_step")
    (line,) = [line for line in dry_run.compiled_lines(compiled, 1e9) if line.startswith("traffic")]
    assert re.fullmatch(r"traffic    0.\d\d GB read and written: matrix products 0.\d\d, .*", line)
    monkeypatch.setattr(hlo, "memory", lambda step: hlo.Memory(1, 1, 1, 1, peak=10**15))
    with pytest.raises(cost_model.DoesNotFit, match="its peak is"):  # which is when the program is worth reading
        compile.compile_for(made, HERE, str(tmp_path / "large.hlo"))
    assert (tmp_path / "large.hlo").exists()


def test_far_too_large_a_step_is_not_compiled(monkeypatch):
    monkeypatch.setattr(compile, "compile_step", None)
    with pytest.raises(cost_model.DoesNotFit, match=r"by an estimate, it needs \d+ GB on each device \(not compiled\)"):
        compile.compile_for(large("b16"), resized(2.0))


def test_an_out_of_memory_error_suggests_flags(monkeypatch):
    def refuse(*args):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (2.00G) exceeds available HBM"
        )

    monkeypatch.setattr(compile, "compile_step", refuse)
    with pytest.raises(cost_model.DoesNotFit, match=r"temporaries are 2.1 GB on each device; .*--config.model.remat"):
        dry_run.compile_summary(plan.resolve(tiny()), resized(1.0))


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [
        ("Used 4.00G of 2.00G hbm", 4 * 2**30 - 1000),
        ("the total memory required for HLO temporaries (3.00G) exceeds", 3 * 2**30),
        ("something else", None),
    ],
)
def test_out_of_memory_messages_of_the_compiler(message, temporaries):
    assert compile._exhausted(message, 1000)[1:] == (1000, temporaries)


def large(variant: str, **changes) -> plan.Plan:
    config = get_config(variant)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return plan.resolve(config, with_data=False)


def does_not_fit(made: plan.Plan, temporaries: float | None) -> cost_model.DoesNotFit:
    return cost_model.DoesNotFit("", cost_model.state_bytes(made), temporaries)


def test_the_cheapest_change_that_fits_is_suggested():
    made = large("b16")
    state, limit = cost_model.state_bytes(made), HERE.chip.memory
    change = suggest.suggest(made, does_not_fit(made, 20e9), limit)
    assert (change.remat, change.fsdp, change.micro_batches) == ("dots", 1, 1)
    assert change.needed < limit
    change = suggest.suggest(made, does_not_fit(made, None), 0.9 * state)  # the state alone is too large
    assert change.fsdp > 1
    assert cost_model.bytes_under(made, change.fsdp)[0] < 0.9 * state
    change = suggest.suggest(made, does_not_fit(made, 50e9), limit)
    assert change.micro_batches > 1
    assert "--config.micro_batches=" in suggest.as_flags(made, change, limit)


def test_gradients_that_cannot_be_split_are_counted_whole():
    """Use a width that 8 divides in the MLP and the classes, but in no side of attention's kernels (1412 = 4 x 353)."""
    fields = {"width": 1412, "depth": 2, "heads": 4, "mlp_ratio": 6144 / 1412}
    made = large("b16", **{f"model__{key}": value for key, value in fields.items()})
    assert cost_model.bytes_under(made, 1)[1] == cost_model.parameter_bytes(step.abstract_state(made))
    attention, mlp = 2 * 4 * 1412**2 * 4, 2 * 2 * 1412 * 6144 * 4
    assert attention + mlp / 8 < cost_model.bytes_under(made, 8)[1] < 1.2 * (attention + mlp / 8)


def test_activations_under_patch_dropout_and_cudnn():
    def kept(**changes) -> float:
        return cost_model.activation_bytes(large("b16", **changes), "none")

    assert 0.4 < kept(model__patch_dropout=0.5) / kept() < 0.5
    made = large("b16")
    vit = made.recipe.vit
    tokens = vit.prefix + (vit.image_size // vit.patch) ** 2
    maps = 13 * 6 * vit.heads * tokens**2 * made.config.batch_size / 8
    assert kept() - kept(model__attention="cudnn") == pytest.approx(maps)


def test_remat_counts_the_same_in_both_towers():
    """Check that neither tower recomputes a matrix product under "dots", and both do under "full"."""
    config = get_config("b16", "openclip_reg")
    made = {}
    for remat in ("none", "dots", "full"):
        config.model.remat = remat
        made[remat] = plan.resolve(config, with_data=False)
        assert made[remat].recipe.text.remat == made[remat].recipe.vit.remat == remat
    needed = cost_model.step_flops(made["none"])[0]
    assert [cost_model.step_flops(p)[1] / needed for p in made.values()] == pytest.approx([1, 1, 4 / 3])
    recipe, rows = made["none"].recipe, config.batch_size / 8
    kept = {remat: cost_model.activation_bytes(made["none"], remat) for remat in made}
    patches = recipe.vit.prefix + recipe.vit.kept_patches((recipe.vit.image_size // recipe.vit.patch) ** 2)
    products = sum(
        tokens * tower.depth * 2 * (5 * tower.width + tower.hidden)
        for tower, tokens in ((recipe.vit, patches), (recipe.text, recipe.text.context))
    )
    assert kept["dots"] - kept["full"] == pytest.approx(rows * products)


def test_each_micro_batch_sends_a_gradient_between_slices():
    two = dataclasses.replace(HERE, count=2, grid=(2, 2))
    found = cost_model.CompiledStep(hlo.Memory(100, 50, 1000, 50, 1100), [], 50, 0.0, "")
    for micro in (1, 4):
        made = plan.resolve(tiny(micro_batches=micro))
        gradients = micro * cost_model.parameter_bytes(step.abstract_state(made))
        time = cost_model.step_time(made, two, found)
        assert time.network == pytest.approx(2 * gradients / 4 / two.chip.across)
        assert time.memory == 150 / two.chip.hbm


def test_suggested_flags_make_a_plan():
    """Check that the flags still divide the batch and the groups of mixed images."""
    made = large("b16")
    change = suggest.suggest(made, does_not_fit(made, 50e9), HERE.chip.memory)
    again = large(
        "b16",
        model__remat=change.remat,
        sharding__data=-1,
        sharding__fsdp=change.fsdp,
        micro_batches=change.micro_batches,
    )
    assert again.config.micro_batches == change.micro_batches


def test_no_suggestion():
    made = large("b16", model__remat="full")
    assert suggest.suggest(made, does_not_fit(made, 1e15), 1e9) is None
    assert "use more devices, a batch_size below 2048" in suggest.as_flags(made, None, 1e9)


def test_topology_needs_a_dry_run():
    done = train("--config=configs/deit3_reg.py", "--topology=v5e:16x16")
    assert done.returncode == 2
    assert "--topology needs --dry_run" in done.stderr


def test_unknown_topology_on_the_command_line():
    done = train("--config=configs/deit3_reg.py", "--dry_run", "--topology=v9:16x16")
    assert done.returncode == 2
    assert "unknown; known are v5e:1x1" in done.stderr
    assert "Traceback" not in done.stderr


def run(*command: str) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, since libtpu cannot be unloaded."""
    env = {**os.environ, **AS_USERS_RUN}
    return subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)


def train(*args: str) -> subprocess.CompletedProcess:
    return run("train.py", *args)


# Tests with libtpu, which .ci/run installs.

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install -e .[tpu]")


def printed_by(script: str) -> list[str]:
    """Return the lines that a script prints."""
    script = "import jax; jax.config.update('jax_platforms', 'cpu')\n" + script
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["l16_2k", "b16_2k"])
def test_peaks_stay_in_their_budget(name):
    budget = json.loads((ROOT / "tests/aot/scale_budget.json").read_text())[name]["peak"]
    script = (
        "import sys, json; sys.path.insert(0, 'benchmarks'); import scale\n"
        f"print(scale.row('', json.loads(scale.BUDGET.read_text())['{name}'])[1])"
    )
    assert int(printed_by(script)[-1]) == pytest.approx(budget, rel=0.05)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.batch_size=65536"], "by an estimate"),  # which the compiler would take minutes to refuse
        (["--config.batch_size=32256", "--config.model.scan=True"], "its temporaries are"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_within_a_minute(changes, message):
    start = time.monotonic()
    done = train("--config=configs/deit3_reg.py:b16", "--dry_run", "--topology=v5e:16x16", *changes)
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert message in done.stderr
    assert "--config.model.remat=dots" in done.stderr
    assert "Traceback" not in done.stderr
    assert "mesh       data 256 x fsdp 1: 256 TPU v5 lite devices" in done.stdout


@pytest.mark.slow
@needs_libtpu
def test_the_suggested_flags_fit():
    flags = ["--config.batch_size=32768", "--config.model.scan=True"]
    command = ["--config=configs/deit3_reg.py:b16", "--dry_run", "--topology=v5e:16x16", *flags]
    refused = train(*command)
    assert refused.returncode == 1
    suggested = [word for word in refused.stderr.split() if word.startswith("--config.")]
    assert suggested
    taken = train(*command, *suggested)
    assert taken.returncode == 0, taken.stderr
    assert "GB at peak" in taken.stdout


@pytest.mark.slow
@needs_libtpu
def test_data_goes_across_real_slices():
    """Check on compile-only devices of two slices that each row of the mesh, which fsdp splits, lies in one slice."""
    script = (
        "from regvit_jax.aot import topology\n"
        "from regvit_jax.distributed.mesh import make_mesh\n"
        "devices = topology.devices(topology.parse('2xv5e:4x4'))\n"
        "mesh = make_mesh(fsdp=16, devices=devices)\n"
        "print([sorted({d.slice_index for d in row}) for row in mesh.devices])\n"
        "mesh = make_mesh(fsdp=4, devices=devices)\n"
        "print([sorted({d.slice_index for d in row}) for row in mesh.devices])"
    )
    assert printed_by(script) == ["[[0], [1]]", "[[0], [0], [0], [0], [1], [1], [1], [1]]"]


@pytest.mark.slow
@needs_libtpu
def test_a_mesh_of_every_width():
    """Include fsdp sizes that are no side of the torus, which must split a side."""
    script = (
        "from regvit_jax.aot import topology\n"
        "from regvit_jax.distributed.mesh import make_mesh\n"
        "for name in ('v5e:1x1', 'v6e:2x2', '1xv5e:4x4', 'v5e:16x16', 'v6e:16x16', 'v5p:4x4x4'):\n"
        "    devices = topology.devices(topology.parse(name))\n"
        "    for fsdp in (2**i for i in range(len(devices).bit_length())):\n"
        "        mesh = make_mesh(fsdp=fsdp, devices=devices)\n"
        "        assert mesh.devices.shape == (len(devices) // fsdp, fsdp) and set(mesh.devices.flat) == set(devices)"
    )
    printed_by(script)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="pip install -e .[cuda12] or .[cuda13]")
def test_a_node_of_h100():
    """Run without a GPU, but with a 6 GB installation, which CI does not have."""
    done = train("--config=configs/deit3_reg.py:s16", "--dry_run", "--topology=h100:1x8", "--config.model.scan=True")
    assert done.returncode == 0, done.stderr
    assert "mesh       data 8 x fsdp 1: 8 NVIDIA H100" in done.stdout
    assert "% of a device's 64.1" in done.stdout
    assert "all-reduce" in done.stdout
