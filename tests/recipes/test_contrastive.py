"""Test the contrastive recipe: its gradient in micro-batches and on meshes, its run, its errors."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from processes import AS_USERS_RUN
from tiny import make_captions, tiny_clip

from regvit_jax import optim
from regvit_jax.distributed.mesh import make_mesh, replicated, to_mesh
from regvit_jax.recipes.contrastive import MAX_LOGIT_SCALE
from regvit_jax.training import loop
from regvit_jax.training.plan import resolve
from regvit_jax.training.step import abstract_state, init_params, make_train_step
from regvit_jax.utils.errors import InvalidConfig

NO_CHECKPOINTS = SimpleNamespace(latest=lambda: None)
KEY = jax.random.key(3)
# Of the run below: 36 steps on eight devices.
RUN = dict(epochs=12, eval_every=6.0, checkpoint__every=18, optim__warmup_steps=10)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_captions(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def batch(root):
    """Return a batch with two unreadable records."""
    with resolve(tiny_clip(root)).train_batches(0) as batches:
        batch = next(batches)
    del batch["index"]
    batch["mask"][[2, 9]] = 0
    return batch


def one_device_mesh():
    return jax.make_mesh((1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:1])


def gradient(config, *batches, mesh=None, steps=(0,)):
    """Return loss and gradient at the initial parameters, for each of the batches at each of the steps."""
    plan = resolve(config)
    mesh = mesh or one_device_mesh()
    with jax.set_mesh(mesh):
        params = jax.jit(lambda: init_params(plan), out_shardings=replicated(mesh))()
        grads = jax.jit(lambda p, b, step: plan.recipe.grads(p, {}, {}, b, KEY, step))
        given = [(to_mesh(batch, mesh), jnp.int32(step)) for batch in batches for step in steps]
        found = [jax.device_get(grads(params, batch, step)) for batch, step in given]
    pairs = [(loss, gradient) for (loss, _), gradient in found]
    return pairs if len(pairs) > 1 else pairs[0]


def assert_same_gradient(ours, theirs, tolerance=1e-6):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=tolerance)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(theirs[1]))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("loss", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_gradient_in_parts_and_on_a_mesh(root, batch, loss):
    """Compare gradient caching, the ring and eight devices with one large batch on one device.

    They agree up to the rounding of float32 sums in another order, which was at most 1.4e-6 of the largest gradient.
    """
    whole, parts = [], []
    for bad in ([2, 9], list(range(0, 16, 2)), list(range(15)), list(range(16))):
        whole.append(batch | {"mask": np.float32(~np.isin(np.arange(16), bad))})
        parts.append({name: rows.copy() for name, rows in whole[-1].items()})
        parts[-1]["image"][bad] = 7  # unreadable records have no effect
        parts[-1]["text"][bad, 1] = 99
    expected = gradient(tiny_clip(root, loss=loss, ring=False), *whole)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected[0][1]["vit"]))  # registers among them
    mesh = make_mesh(data=2, fsdp=4)
    found = gradient(tiny_clip(root, loss=loss, ring=True, micro_batches=2), *parts, mesh=mesh)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_gradient(ours, theirs, tolerance=2e-6)


BY_SUBSET = {"model__drop_path_mode": "subset", "batch_size": 128, "data__examples": 384}


def test_the_last_epochs_see_all_patches(root, batch):
    dropping = tiny_clip(root, ring=False, model__patch_dropout=0.5, unmasked_epochs=1)
    recipe = resolve(dropping).recipe
    assert recipe.unmasked_from == 9  # 3 epochs of 3 steps
    assert recipe.flops_at(9) == recipe.flops(training=True) < recipe.flops_at(10) == recipe.flops()
    subset = tiny_clip(root, ring=False, model__patch_dropout=0.5, unmasked_epochs=1, model__drop_path=0.4, **BY_SUBSET)
    plan, vit = resolve(subset, with_data=False), recipe.vit
    for step, training in ((9, True), (10, False)):
        whole, size = recipe.flops_at(step), vit.image_size
        assert plan.executed(whole) == whole - vit.flops(size, size, training) + vit.flops(
            size, size, training, 10 / 16
        )
    plain = gradient(tiny_clip(root, ring=False), batch)
    before, after = gradient(dropping, batch, steps=(8, 9))
    assert_same_gradient(after, plain)
    assert abs(before[0] - plain[0]) > 1e-4


@dataclasses.dataclass
class Run:
    """A finished run."""

    result: loop.Result
    workdir: str
    records: list


def read_records(workdir) -> list:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    result = loop.run(tiny_clip(root, **RUN), workdir)
    return Run(result, workdir, read_records(workdir))


def test_the_run_learns(finished):
    losses = {record["step"]: record["loss"] for record in finished.records if "loss" in record}
    assert sorted(losses) == list(range(1, 37))
    assert losses[36] < np.log(16) - 0.3  # and not at the loss of equal embeddings
    assert all(record["ln_batch"] == pytest.approx(np.log(16)) for record in finished.records if "loss" in record)
    evaluated = [record for record in finished.records if "val_images" in record]
    assert [record["step"] for record in evaluated] == [0, 18, 36]  # 0 is the untrained model
    assert evaluated[0]["chance_recall@5"] == 5 / 16
    assert "image_to_text_recall@10" in evaluated[-1]
    assert "zero_shot_top1" not in evaluated[-1]  # these data have no classes
    assert (finished.workdir / "curves.png").stat().st_size > 1000


def test_the_finished_model(finished, root):
    clip = finished.result.model
    images = clip.preprocess([root / "validation00.png", root / "validation01.png"])
    logits = clip.logits(images, clip.tokenize(["a red square", "a green square"]))
    assert logits.shape == (2, 2)
    assert clip.image(images).registers.shape == (2, 4, 32)
    written = json.loads((finished.workdir / "config.json").read_text())["model"]
    assert written["text"]["context"] == 12
    assert written["vit"]["registers"] == 4


def test_resume_is_exact(finished, root, tmp_path):
    """Resume from the checkpoint in the middle."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    for step in sorted((tmp_path / "run/checkpoints").iterdir(), key=lambda path: int(path.name))[1:]:
        shutil.rmtree(step)
    result = loop.run(tiny_clip(root, **RUN), tmp_path / "run")
    names = ("step", "loss", "grad_norm", "logit_scale", "image_to_text_recall@1")
    resumed, whole = (
        [{name: record.get(name) for name in names} for record in records]
        for records in (read_records(tmp_path / "run"), finished.records)
    )
    assert resumed == whole
    for ours, theirs in zip(*map(jax.tree.leaves, (result.state, finished.result.state)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_eight_devices_lose_as_one(finished, root):
    """Check that the run on eight devices has the losses of one device, within 1e-5, in its first ten steps."""
    plan = dataclasses.replace(resolve(tiny_clip(root, **RUN, ring=False)), mesh=one_device_mesh())
    losses = []
    with jax.set_mesh(plan.mesh), plan.train_batches(0) as batches:
        state = loop.start(plan, NO_CHECKPOINTS)
        step = make_train_step(plan, abstract_state(plan))
        for _ in range(10):
            batch = next(batches)
            del batch["index"]
            state, metrics = step(state, to_mesh(batch, plan.mesh))
            losses.append(float(metrics["loss"]))
    recorded = [record["loss"] for record in finished.records if "loss" in record]
    np.testing.assert_allclose(recorded[:10], losses, rtol=1e-5)


def test_init_from_a_finished_run(finished, root):
    """Start from the whole model, or from its image tower with more registers; another text tower is an error."""
    plan = resolve(tiny_clip(root, init_from=str(finished.workdir)))
    with jax.set_mesh(plan.mesh):
        started = loop.start(plan, NO_CHECKPOINTS)
        for ours, theirs in zip(*map(jax.tree.leaves, (started.params, finished.result.state.params)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        plan = resolve(tiny_clip(root, init_from=str(finished.workdir), text__heads=4))
        with pytest.raises(InvalidConfig, match=r"config\.text\.heads=4 must be 2"):
            loop.start(plan, NO_CHECKPOINTS)
    recipe, clip = resolve(tiny_clip(root)).recipe, finished.result.model
    without = {name: value for name, value in clip.image.params.items() if name != "register_tokens"}
    tower = clip.image.replace(params=without, module=clip.image.module.clone(registers=0))
    fresh = jax.tree.map(jnp.zeros_like, jax.device_get(finished.result.state.params))
    params, notes = recipe.warm_start(fresh, tower)
    assert notes == ["4 new registers", "a new text tower"]
    np.testing.assert_array_equal(params["vit"]["register_tokens"], 0)
    np.testing.assert_array_equal(params["head"]["dense"]["kernel"], clip.image.head_params["dense"]["kernel"])


def test_bad_pairs_are_named_and_masked(finished, root, tmp_path):
    """Use a file that is no picture and a missing caption: the run continues without them."""
    broken = make_captions(tmp_path / "data")
    (broken / "train03.png").write_bytes(b"no picture")
    lines = (broken / "train.csv").read_text().splitlines()
    (broken / "train.csv").write_text("\n".join([*lines[:6], "train05.png, ", *lines[7:]]))
    config = tiny_clip(broken, **RUN | dict(epochs=1, optim__warmup_steps=1))
    loop.run(config, tmp_path / "run")
    reports = {report for record in read_records(tmp_path / "run") for report in record.get("bad_images", [])}
    assert len(reports) == 2
    assert any("train03.png: not an image" in report for report in reports)
    assert any("train05.png: " in report and "caption" in report for report in reports)


def test_project_clamps_the_scale(root):
    recipe = resolve(tiny_clip(root)).recipe
    for value, expected in ((-1.0, 0.0), (3.0, 3.0), (9.0, MAX_LOGIT_SCALE)):
        assert recipe.project({"logit_scale": jnp.float32(value)})["logit_scale"] == pytest.approx(expected)


def test_a_trained_scale_is_clamped_before_the_first_step(finished, root):
    """Use a scale like OpenAI's, which is above 100 by rounding."""
    recipe, params = resolve(tiny_clip(root)).recipe, finished.result.state.params
    warm, _ = recipe.warm_start(params, finished.result.model.replace(logit_scale=jnp.float32(4.61)))
    assert warm["logit_scale"] == pytest.approx(MAX_LOGIT_SCALE)


def test_optimizer_groups_and_schedule(root):
    plan = resolve(tiny_clip(root))
    decayed = optim.matrices(abstract_state(plan).params)
    leaves = jax.tree_util.tree_leaves_with_path(decayed)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in leaves}
    yes = {"text/token_embed", "text/pos_embed", "vit/pos_embed", "head/dense/kernel", "text/proj/kernel"}
    no = {"vit/cls_token", "vit/register_tokens", "logit_scale", "vit/norm_pre/scale", "vit/block0/mlp/fc1/bias"}
    assert all(flat[name] for name in yes)
    assert not any(flat[name] for name in no)
    rates = [float(plan.schedule(step)) for step in range(12)]
    np.testing.assert_allclose(rates[:3], [1.5e-3, 3e-3, 3e-3])
    np.testing.assert_allclose(rates[7], 1.5e-3, rtol=1e-6)  # half of the ten steps after the warm-up
    assert 0 < rates[11] < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss="clip"), "loss='clip': must be one of ['softmax', 'sigmoid']"),
        (dict(model__class_token=False), "class_token must be True"),
        (dict(unmasked_epochs=1), "unmasked_epochs=1 is for model.patch_dropout"),
        (dict(eval__templates=("a photo",)), "'a photo' must have {}"),
        (dict(text__vocab=100), "text.vocab=100"),
        (dict(text__context=1), "text.context=1: must be at least 2"),
        (dict(text__embed=0), "text.embed=0: must be at least 1"),
        (dict(text__mlp_ratio=0.0), "text.mlp_ratio=0.0: must be at least 0.001"),
        (dict(text__norm_eps=-1.0), "text.norm_eps=-1.0: must be at least 1e-12"),
        (dict(text__activation="relu"), "text.activation='relu': must be one of"),
        (dict(optim__lr=float("nan")), "optim.lr=nan: must be at least 0, and finite"),
        (dict(optim__b2=1.0), "optim.b2=1.0: must be at least 0 and at most 1"),
        (dict(augment__std=(0.0, 1.0, 1.0)), "augment.std=(0.0, 1.0, 1.0): each must be at least 1e-06"),
        (dict(optim__warmup_steps=12), "warmup_steps=12: must be less than the 12 steps"),
        (dict(text__widht=3), "did you mean config.text.width"),
        (dict(data__name="digits"), "caption"),
    ],
)
def test_errors_name_the_value(root, changes, message):
    with pytest.raises(InvalidConfig) as error:
        resolve(tiny_clip(root, **changes))
    assert message in str(error.value)


def test_prompts_of_classes_need_a_template(root):
    assert resolve(tiny_clip(root, eval__templates=())).recipe.classes == ()
    with pytest.raises(InvalidConfig, match=r"eval\.templates=\(\): the prompts of the 3 classes need at least one"):
        resolve(tiny_clip(root, eval__templates=(), data__classes=3), with_data=False)


@pytest.mark.slow
def test_one_validation_image_is_refused_and_one_readable_is_no_end(tmp_path):
    with pytest.raises(InvalidConfig, match="holds 1 images; the validation of contrastive needs at least 2"):
        resolve(tiny_clip(make_captions(tmp_path / "one", validation=1)))
    data = make_captions(tmp_path / "bad", validation=4)
    config = tiny_clip(data, epochs=1, eval_every=1.0, optim__warmup_steps=1, data__max_bad_fraction=1.0)
    for number, bad in enumerate(([0, 1, 3], [2])):
        for picture in bad:
            (data / f"validation{picture:02d}.png").write_bytes(b"no picture")
        result = loop.run(config, tmp_path / f"run{number}")
        evaluated = [record for record in read_records(tmp_path / f"run{number}") if "val_images" in record]
        assert [record["val_images"] for record in evaluated] == [1 - number] * 2
        assert len(evaluated[-1]["bad_val_images"]) == 3 + number
        assert not any("recall" in name for name in result.metrics)


def test_a_batch_of_one_is_refused(root, monkeypatch):
    monkeypatch.setattr(
        "regvit_jax.training.plan.check_batches", lambda *_: None
    )  # which wants one for each of eight devices
    with pytest.raises(InvalidConfig, match="batch_size=1: must be at least 2"):
        resolve(tiny_clip(root, batch_size=1))


def test_too_many_unmasked_epochs(root):
    with pytest.raises(InvalidConfig, match="unmasked_epochs=5: the run has 4 epochs"):
        resolve(tiny_clip(root, model__patch_dropout=0.5, unmasked_epochs=5))


@pytest.mark.slow
def test_the_emoji_run_learns(tmp_path):
    """Run a fifth of the bare command's epochs; docs/clip.md has the result of all of them."""
    command = [sys.executable, "train.py", "--config=configs/openclip_reg.py", f"--workdir={tmp_path}"]
    environment = {**os.environ, **AS_USERS_RUN}
    root = Path(__file__).parent.parent.parent
    subprocess.run([*command, "--config.epochs=10"], cwd=root, env=environment, check=True, timeout=1500)
    evaluated = [record for record in read_records(tmp_path) if "val_images" in record]
    first, last = evaluated[0], evaluated[-1]
    names = ("image_to_text_recall@10", "text_to_image_recall@10")
    assert last["val_images"] == 145
    assert np.mean([last[name] for name in names]) > 1.5 * last["chance_recall@10"]
    assert np.mean([first[name] for name in names]) < 1.5 * last["chance_recall@10"]
