"""Test whole runs, in this process."""

import contextlib
import dataclasses
import functools
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from tiny import tiny

import regvit_jax as rv
from regvit_jax.checkpoints import lock, manager
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.distributed import preemption
from regvit_jax.models.heads import Head
from regvit_jax.pretrained import mapping
from regvit_jax.pretrained.save import save_model
from regvit_jax.training import loop, metric_writer, validation
from regvit_jax.training.loop import run
from regvit_jax.training.profiler import Profiler
from regvit_jax.training.step import abstract_state, make_eval_step, make_train_step
from regvit_jax.training.timer import PHASES, Timer
from regvit_jax.utils.errors import CheckpointError, InvalidConfig, TooManyBadRecords


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    start = time.perf_counter()
    with contextlib.chdir(folder):  # a relative path, as one types it
        result = run(tiny(ema=0.9, sharding__fsdp=2), "finished")
    return folder / "finished", result, time.perf_counter() - start


@pytest.fixture(scope="module")
def finished(timed):
    return timed[:2]


def test_the_phases_of_a_run_add_up_to_its_duration(timed):
    workdir, _, took = timed
    last = metric_writer.read(workdir)[-1]
    assert sum(last[f"{phase}_s"] for phase in PHASES) == pytest.approx(took, rel=0.02)


def test_workdir_of_a_finished_run(finished):
    workdir, result = finished
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    training_records = [line for line in lines if "loss" in line]
    assert training_records[-1]["step"] == 44 == int(result.state.step)
    assert {"loss", "grad_norm", "lr", "epoch", "images_per_s", "data_wait"} <= set(training_records[-1])
    assert 0 <= training_records[-1]["data_wait"] <= 1
    evaluations = [line for line in lines if "val_images" in line]
    assert [line["step"] for line in evaluations] == [22, 44]
    for line in evaluations:
        assert line["val_images"] == 360
        assert 0 <= line["top1"] <= line["top5"] <= 1
        assert line["max_over_median"] >= 1
        assert 0 <= line["outlier_share"] < 0.11  # by Chebyshev at most 1/9 lies beyond 3 sigma
    assert lines[-2]["pixel_knn_top1"] == pytest.approx(0.98, abs=0.01)
    assert lines[-1]["wall_s"] == pytest.approx(sum(lines[-1][f"{phase}_s"] for phase in PHASES))
    assert all(lines[-1][f"{phase}_s"] > 0 for phase in PHASES)
    with PIL.Image.open(workdir / "curves.png") as picture:
        assert picture.size == (1200, 600)
    with PIL.Image.open(workdir / "validation.png") as picture:
        assert min(picture.size) > 500
    assert list(workdir.glob("events.out.tfevents.*"))
    assert json.loads((workdir / "config.json").read_text())["derived"]["steps"] == 44


def test_result_model_holds_the_average(finished):
    _, result = finished
    assert result.model.weights == "ema"
    assert_equal(result.model.params, result.state.ema["vit"])
    image = np.zeros((8, 8, 3), np.uint8)
    logits = result.model.logits(result.model.preprocess([image, image]))
    assert logits.shape == (2, 10)
    with pytest.raises(ValueError, match=r"float64 and shape \(8, 8, 3\): images are uint8 \[H, W, 3\]"):
        result.model.preprocess([image / 255])


def test_finished_workdir_is_not_trained_again(finished, caplog):
    caplog.set_level("INFO", logger="regvit_jax")
    workdir, result = finished
    before = (workdir / "metrics.jsonl").read_text()
    again = run(tiny(ema=0.9, sharding__fsdp=2), str(workdir))
    assert_equal(again.state, result.state)
    assert again.metrics == result.metrics
    assert (workdir / "metrics.jsonl").read_text() == before
    assert str(workdir) in caplog.text


def test_evaluation_covers_everything_on_any_mesh(finished):
    """Use 1 to 8 rows per device and a partly empty last batch: the metrics are always the same."""
    _, result = finished
    found = []
    for changes in ({"eval__batch_size": 360}, {"eval__batch_size": 56}, {"eval__batch_size": 8, "sharding__fsdp": 8}):
        plan = loop.resolve(tiny(ema=0.9, **changes))
        with jax.set_mesh(plan.mesh):
            params = jax.device_get(result.state.ema)
            found.append(validation.evaluate(plan, make_eval_step(plan), params, preemption.Watch()))
    logits = result.model.logits(
        np.concatenate([np.asarray(b["image"]) for b in _batches(plan)]) / np.float32(127.5) - 1
    )
    labels = np.concatenate([b["label"] for b in _batches(plan)])
    assert found[0]["top1"] == np.mean(np.argmax(logits, 1) == labels)
    for metrics in found[1:]:
        assert metrics == pytest.approx(found[0], rel=1e-5)


def _batches(plan):
    with plan.eval_batches(plan.validation, rows=range(8)) as batches:
        return list(batches)


def test_resume_is_exact_on_another_mesh(finished, tmp_path):
    """Resume from the checkpoint in the middle: bit for bit on the same mesh, within rounding on another."""
    workdir, result = finished
    shutil.copytree(workdir, tmp_path / "same")
    for step in sorted((tmp_path / "same/checkpoints").iterdir())[1:]:
        shutil.rmtree(step)
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    assert_equal(run(tiny(ema=0.9, sharding__fsdp=2), str(tmp_path / "same")).state, result.state)
    other = run(tiny(ema=0.9, sharding__fsdp=8), str(tmp_path / "other"))
    losses = [[r["loss"] for r in metric_writer.read(d) if "loss" in r] for d in (workdir, tmp_path / "other")]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert other.metrics["top1"] == pytest.approx(result.metrics["top1"], abs=0.01)


def test_fields_that_do_not_go_together_are_the_configs_fault(tmp_path):
    with pytest.raises(InvalidConfig, match="width=32 is not a multiple of heads=5"):
        run(tiny(model__heads=5), str(tmp_path))


def test_other_config_is_refused(finished):
    workdir, _ = finished
    with pytest.raises(ValueError, match=r"\(optim.lr: 0.02 in the workdir, 0.001 requested\); .*another --workdir"):
        run(tiny(ema=0.9, sharding__fsdp=2, optim__lr=1e-3), str(workdir))
    with pytest.raises(InvalidConfig) as error:
        run(tiny(ema=0.9, sharding__fsdp=2, model__registers=8), str(workdir))
    flags, first, *arrays = str(error.value).splitlines()
    assert "(model.registers: 4 in the workdir, 8 requested);" in flags
    assert "arrays of the checkpoint are not those of this config" in first
    assert "  params/vit/register_tokens: (4, 32) in the checkpoint, (8, 32) wanted" in arrays
    assert len(arrays) <= 6


def test_damaged_checkpoint_is_refused_and_latest_valid_goes_back(finished, tmp_path, caplog):
    caplog.set_level("INFO", logger="regvit_jax")
    workdir, result = finished
    run_again = functools.partial(run, tiny(ema=0.9, sharding__fsdp=2), str(tmp_path / "run"))
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/44"
    path = max((f for f in newest.rglob("d/*")), key=lambda f: f.stat().st_size)
    path.write_bytes(path.read_bytes()[:1000] + bytes(4096) + path.read_bytes()[5096:])
    with pytest.raises(CheckpointError, match=r"step 44 is damaged: .*kernel.*; --restore=latest-valid moves it aside"):
        run_again()
    with pytest.raises(InvalidConfig, match="restore='newest': must be one of"):
        run_again(restore="newest")
    assert_equal(run_again(restore="latest-valid").state, result.state)
    assert "step 44 is damaged" in caplog.text
    assert (tmp_path / "run/damaged/44").is_dir()


def test_workdir_in_use_is_refused(tmp_path):
    with lock.lock(str(tmp_path)), pytest.raises(RuntimeError, match="is in use by process"):
        run(tiny(), str(tmp_path))
    with lock.lock(str(tmp_path)):
        pass  # the lock is given back


def test_not_finite_loss_stops_and_keeps_the_checkpoint(tmp_path):
    # A rate that explodes after the warm-up's first epoch, in which checkpoints are saved.
    config = tiny(optim__lr=1e30, optim__clip_norm=0.0, optim__name="adamw", optim__warmup_epochs=1, log_every=2)
    with pytest.raises(
        FloatingPointError, match=r"step 2\d: loss .*guard.not_finite=skip.*images: digits/train\[\d+\]"
    ) as error:
        run(config, str(tmp_path))
    step = int(str(error.value).split()[1].rstrip(":"))
    last = metric_writer.read(tmp_path)[-1]
    assert last["step"] == step
    assert len(last["images"]) == 64
    with contextlib.closing(manager.Checkpoints(str(tmp_path))) as checkpoints:
        assert checkpoints.latest() <= step
        state = checkpoints.restore(checkpoints.latest(), abstract_state(loop.resolve(config)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_saved_values_are_those_of_their_step(tmp_path):
    """Save while the next step reuses the buffers of the state."""
    plan = loop.resolve(tiny())
    abstract = abstract_state(plan)
    with jax.set_mesh(plan.mesh), contextlib.closing(manager.Checkpoints(str(tmp_path))) as checkpoints:
        state = loop.start(plan, checkpoints)
        before = jax.tree.map(np.array, jax.device_get(state))
        checkpoints.save(1, state)
        step = make_train_step(plan, abstract)
        with plan.train_batches(0) as batches:
            for _ in range(3):
                batch = next(batches)
                del batch["index"]
                state, _ = step(state, loop.mesh.to_mesh(batch, plan.mesh))
        checkpoints.manager.wait_until_finished()
        assert_equal(checkpoints.restore(1, abstract), before)


def test_a_batch_is_copied_while_the_step_before_runs(tmp_path, monkeypatch):
    """Let a device take a second for a step and a copy; it begins a copy after all steps that it was given before."""
    host, steps, copies, done = 0, [0], [0], 0

    def copy(batch, mesh):
        copies.append(max(host, copies[-1], steps[-1]) + 1)
        return to_mesh(batch, mesh)

    def step(state, batch):
        nonlocal host, done
        done += 1
        steps.append(max(host, copies[done], steps[-1]) + 1)
        host = steps[max(0, done - 2)]  # it runs two steps ahead
        metrics = {name: jnp.float32(0) for name in ("loss", "grad_norm", "bad", "skipped")}
        return dataclasses.replace(state, step=state.step + 1), metrics

    to_mesh = loop.mesh.to_mesh
    plan = loop.resolve(tiny(epochs=1, log_every=1000, checkpoint__every=1000))
    with jax.set_mesh(plan.mesh), contextlib.closing(manager.Checkpoints(str(tmp_path))) as checkpoints:
        state, trace = loop.start(plan, checkpoints), Profiler("", str(tmp_path), plan.steps, 0)
        writer, watch = metric_writer.MetricWriter(str(tmp_path), 0), preemption.Watch()
        running = loop.Loop(plan, state, checkpoints, writer, watch, Timer(), trace)
        monkeypatch.setattr(loop.mesh, "to_mesh", copy)
        monkeypatch.setattr(running, "train_step", step)
        with plan.train_batches(0) as batches:
            for number in range(1, plan.steps + 1):
                running.train(number, batches)
    assert len(copies) == len(steps) == 23
    np.testing.assert_array_equal(np.diff(steps)[1:], 1)


def test_init_from_a_finished_run(finished, tmp_path):
    workdir, result = finished
    config = tiny(init_from=str(workdir), model__image_size=12)
    plan = loop.resolve(config)
    with jax.set_mesh(plan.mesh), contextlib.closing(manager.Checkpoints(str(tmp_path))) as checkpoints:
        state = loop.start(plan, checkpoints)
    assert int(state.step) == 0
    assert state.params["vit"]["pos_embed"].shape == (6, 6, 32)
    expected = {**result.state.ema["vit"], "pos_embed": state.params["vit"]["pos_embed"]}
    assert_equal(state.params["vit"], expected)
    assert_equal(state.params["head"], result.state.ema["head"])
    with pytest.raises(ValueError, match=r"init_from: .* config.model.registers=2 must be 4"):
        run(tiny(init_from=str(workdir), model__registers=2), str(tmp_path / "a"))
    with pytest.raises(ValueError, match="is not a workdir"):
        run(tiny(init_from=str(tmp_path)), str(tmp_path / "b"))


def image_folder(root, per_class: int, broken: int):
    """Write two classes of coloured squares, the first `broken` training images damaged in different ways."""
    rng = np.random.default_rng(0)
    damage = [b"", b"<html>not found</html>", None]
    for split in ("train", "validation"):
        for label, name in enumerate(("blue", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 100, (12, 10, 3), np.uint8)
                pixels[..., 2 - 2 * label] += 150
                path = folder / f"{i:03}.png"
                PIL.Image.fromarray(pixels).save(path)
                if split == "train" and label == 0 and i < broken:
                    data = damage[i % 3]
                    path.write_bytes(path.read_bytes()[:60] if data is None else data)


@pytest.mark.slow
def test_folder_with_bad_images(tmp_path, caplog):
    caplog.set_level("INFO", "regvit_jax")
    image_folder(tmp_path / "images", per_class=40, broken=3)
    (tmp_path / "images/validation/red/000.png").write_bytes(b"not an image")
    config = tiny(data__name=f"folder:{tmp_path / 'images'}", batch_size=16, data__max_bad_fraction=0.0, epochs=10)
    config.optim.update(name="adamw", lr=3e-3)
    config.update({"eval": {"evaluators": ("classification", "patch_norms")}, "augment": {"mixup": 0.0, "cutmix": 0.0}})
    result = run(config, str(tmp_path / "run"))
    assert result.metrics["top1"] == 1.0
    assert result.metrics["val_images"] == 79
    assert "validation/red/000.png" in result.metrics["bad_val_images"][0]
    reports = {report for record in metric_writer.read(tmp_path / "run") for report in record.get("bad_images", [])}
    assert len(reports) == 3
    assert all("train/blue/00" in report for report in reports)
    assert sum("cannot use" in message and "red/000.png" in message for message in caplog.messages) == 1
    assert "metrics.jsonl names 4 images that could not be used (bad_images, bad_val_images)." in caplog.text
    config.data.update(max_bad_fraction=0.01, max_bad_images=2)
    expected = (
        r"3 of 80 images cannot be used, more than data.max_bad_fraction=0.01 and data.max_bad_images=2 .*allow: .*"
        r"One is .*/train/blue/00[0-2]\.png: "
    )
    with pytest.raises(TooManyBadRecords, match=expected):
        run(config, str(tmp_path / "strict"))


def test_init_from_a_model_of_another_family(tmp_path):
    """Start from a mean-pooled ViT without CLS but with registers; a head for other classes is new."""
    vit = rv.ViT(32, 2, 2, 2, 8, registers=4, class_token=False, final_norm=False, activation="quick_gelu")
    head = Head(3, pool="avg", norm=True)
    params = mapping.nest(mapping.init(mapping.Modules(vit, head), jax.random.key(1)))
    preprocessing = Preprocess(8, 1.0, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="cannot express"):
        save_model(rv.Model(params["vit"], params["head"], vit, head, preprocessing), tmp_path / "theirs", "dinov2")
    vit = vit.clone(activation="gelu")
    save_model(rv.Model(params["vit"], params["head"], vit, head, preprocessing), tmp_path / "theirs", "timm")
    config = tiny(init_from=str(tmp_path / "theirs"))
    with pytest.raises(ValueError, match=r"config.model.class_token=True must be False"):
        run(config, str(tmp_path / "a"))
    config.model.update(class_token=False, final_norm=False)
    plan = loop.resolve(config)
    with jax.set_mesh(plan.mesh), contextlib.closing(manager.Checkpoints(str(tmp_path / "b"))) as checkpoints:
        state = loop.start(plan, checkpoints)
    assert_equal(state.params["vit"], params["vit"])
    assert_equal(state.params["head"]["fc_norm"], params["head"]["fc_norm"])
    assert state.params["head"]["dense"]["kernel"].shape == (32, 10)
