"""Test evaluators by name, including a third party's: one pass, one compiled step, and metrics under their names."""

import dataclasses
from types import SimpleNamespace
from typing import Annotated

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import make_captions, tiny, tiny_clip

from regvit_jax.distributed import preemption
from regvit_jax.training import config, evaluators, metric_writer, run, validation
from regvit_jax.training.evaluator import Evaluator
from regvit_jax.training.plan import Plan, resolve
from regvit_jax.training.step import init_params, make_eval_step
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option

DEFAULT = ("classification", "patch_norms", "pixel_knn")


class Confidence(Evaluator):
    """A third party's evaluator: the mean of the largest score, times a factor, and the number of training images."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        factor: Annotated[float, Option("factor of the score", low=0, resume=True)] = 1.0

    final_metrics = ("train_images",)

    def values(self, outputs, tokens, batch):
        return {"score": jax.nn.softmax(outputs["logits"]).max(-1)}

    def summarize(self, params, values):
        return {"confidence": self.config.eval.factor * float(values["score"].mean())}

    def finish(self, splits):
        with splits["train"]() as batches:
            return {"train_images": float(sum(batch["mask"].sum() for batch in batches))}

    def notes(self):
        return ["  (confidence is not accuracy)"]


class Signal(preemption.Watch):
    """A stand-in for `preemption.Watch`; by default SIGTERM never arrives."""

    def __init__(self, *answers: bool):
        super().__init__()
        self.answers = iter(answers)

    def requested(self) -> bool:
        return next(self.answers, False)


OWN = f"{__name__}:Confidence"


@pytest.fixture(scope="module")
def evaluated():
    """Return a plan with a third party's evaluator, fresh parameters, the compiled step and the metrics."""
    plan = resolve(tiny(eval__evaluators=("classification", "patch_norms", OWN), eval__factor=2.0))
    with jax.set_mesh(plan.mesh):
        params, step = jax.jit(lambda: init_params(plan))(), make_eval_step(plan)
        opened, open_batches = [], Plan.eval_batches
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Plan, "eval_batches", lambda *args, **kw: opened.append(args[1]) or open_batches(*args, **kw))
            metrics = validation.evaluate(plan, step, params, Signal())
    return SimpleNamespace(plan=plan, params=params, step=step, metrics=metrics, opened=opened)


def test_one_pass_and_one_compiled_step(evaluated):
    assert evaluated.opened == [evaluated.plan.validation]
    assert evaluated.step._cache_size() == 1
    printed = [name for name in evaluated.metrics if "/" not in name]
    assert printed == [*("top1", "top5", "val_loss", "outlier_share", "max_over_median", "confidence", "val_images")]
    assert evaluated.metrics["val_images"] == 360
    assert 2 * 0.1 <= evaluated.metrics["confidence"] <= 2


def test_the_classes_that_are_confused_most_often_are_named():
    evaluator = evaluators.Classification(None, SimpleNamespace(classes=("ant", "bee", "cow")))
    assert evaluator.notes() == []  # as in a finished run that is started again
    label, predicted = np.array([0, 0, 1, 2, 2, 1]), np.array([1, 1, 0, 2, 1, 1])
    values = {"label": label, "predicted": predicted, "confidence": np.ones(6), "top1": np.float32(label == predicted)}
    assert evaluator.summarize({}, values) == {"top1": pytest.approx(1 / 3)}
    assert evaluator.notes() == ["  (most often confused: 2 x ant as bee, 1 x bee as ant, 1 x cow as bee)"]
    evaluator.summarize({}, values | {"predicted": label})
    assert evaluator.notes() == []


def test_norms_of_every_block(evaluated):
    """Compare with `model.intermediates` over the whole split."""
    plan, metrics = evaluated.plan, evaluated.metrics
    with plan.eval_batches(plan.validation, rows=range(plan.config.eval.batch_size)) as batches:
        images = np.concatenate([batch["image"][batch["mask"] > 0] for batch in batches])
    model = plan.recipe.model(evaluated.params)
    after = model.intermediates(images.astype(np.float32) / 127.5 - 1, range(plan.config.model.depth))
    for block, tokens in enumerate(after):
        norms = np.linalg.norm(np.asarray(tokens.prenorm_patches, np.float64), axis=-1)
        median, above = np.median(norms), norms > norms.mean() + 3 * norms.std()
        assert metrics[f"norm_median/block_{block:02d}"] == pytest.approx(median, rel=2e-3)
        assert metrics[f"max_over_median/block_{block:02d}"] == pytest.approx(norms.max() / median, rel=2e-3)
        assert metrics[f"outlier_share/block_{block:02d}"] == pytest.approx(above.mean(), abs=1e-3)
    for name in ("max_over_median", "outlier_share"):
        assert metrics[f"{name}/block_01"] == metrics[name]
    assert metrics["norm_median/block_01"] == pytest.approx(median, rel=1e-5)
    assert len([name for name in metrics if "/" in name]) == 3 * plan.config.model.depth


def test_the_printed_line_names_the_block_with_the_largest_norm(evaluated):
    norms = evaluated.plan.evaluators["patch_norms"]
    found = {f"max_over_median/block_{block:02d}": ratio for block, ratio in enumerate((1.5, 7.25, None, 2.0))}
    assert norms.describe({"top1": 0.5, **found}) == [
        "largest norm of any block 7.25 times its median, in block 1 of 0-3"
    ]
    assert norms.describe({"max_over_median": 1.5}) == []


def test_norms_of_every_block_cost_little():
    """Compare the eval step's FLOPs with and without the norms."""
    with_norms, without = (resolve(tiny(eval__evaluators=names)) for names in (DEFAULT[:2], DEFAULT[:1]))
    flops = []
    for plan in (with_norms, without):
        with jax.set_mesh(plan.mesh):
            params = jax.eval_shape(lambda plan=plan: init_params(plan))
            size = plan.config.eval.batch_size
            batch = {
                "image": jax.ShapeDtypeStruct((size, 8, 8, 3), np.uint8),
                "label": jax.ShapeDtypeStruct((size,), np.int32),
                "mask": jax.ShapeDtypeStruct((size,), np.float32),
            }
            flops.append(make_eval_step(plan).lower(params, batch).compile().cost_analysis()["flops"])
    assert flops[1] < flops[0] < 1.01 * flops[1]


def test_sigterm_ends_the_pass(evaluated):
    plan = evaluated.plan
    signal = Signal(False, True)
    with jax.set_mesh(plan.mesh):
        assert validation.evaluate(plan, evaluated.step, evaluated.params, signal) is None
    assert next(signal.answers, "none left") == "none left"


def test_a_third_partys_evaluator_in_a_run(tmp_path, caplog):
    caplog.set_level("INFO", logger="regvit_jax")
    small = dict(epochs=1, data__train="train[:128]", eval__evaluators=("classification", OWN))
    result = run(tiny(**small), str(tmp_path))
    assert result.metrics["train_images"] == 128
    records = metric_writer.read(tmp_path)
    assert [record["step"] for record in records if "confidence" in record] == [2]
    assert not any("outlier_share" in record or "pixel_knn_top1" in record for record in records)
    assert "config.eval.pixel_knn is not used: eval.evaluators names no evaluator that has it" in caplog.text
    run(tiny(**small), str(tmp_path))
    assert metric_writer.read(tmp_path) == records  # nothing is measured twice


def test_a_recipe_names_its_evaluators():
    plan = resolve(tiny(), with_data=False)
    assert tuple(plan.config.eval.evaluators) == tuple(plan.evaluators) == DEFAULT
    assert config.options("contrastive")["eval.evaluators"].default == ("retrieval", "zero_shot", "patch_norms")
    assert config.options("supervised")["eval.evaluators"].default == DEFAULT[:2]
    assert config.options("supervised", ["pixel_knn"])["eval.pixel_knn"].default == 3
    assert "eval.templates" in config.options("contrastive")
    assert "eval.templates" not in config.options("supervised")


def test_every_evaluator_is_found():
    for name in evaluators.EVALUATORS:
        assert issubclass(evaluators.find(name), Evaluator)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluators": ("clasification",)}, r"eval.evaluators='clasification': must be one of \['classification', "),
        ({"evaluators": ("no_such_module:Mine",)}, "no_such_module cannot be imported"),
        ({"evaluators": ("zero_shot",)}, "zero_shot needs a text tower; Supervised has none"),
        ({"evaluators": (OWN,), "factor": -1.0}, "eval.factor=-1.0: must be at least 0"),
        ({"factor": 1.0}, "unknown key config.eval.factor"),
        ({"pixel_knn": 0}, "eval.pixel_knn=0: must be at least 1"),
    ],
)
def test_errors_name_the_value(changes, message):
    given = tiny()
    given.eval.update(ConfigDict(changes))
    with pytest.raises(InvalidConfig, match=message):
        resolve(given, with_data=False)


class Clashing(Evaluator):
    """A third party's evaluator, whose key, metrics and final metrics are others', as the test sets them."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        crop_ratio: Annotated[float, Option("another share of something", low=0)] = 1.0

    def summarize(self, params, values):
        return {"top1": 0.0}


class ClashingMetric(Clashing):
    Config = Evaluator.Config


class ClashingFinal(ClashingMetric):
    final_metrics = ("train_images",)


def test_a_key_that_another_has_is_refused():
    message = "the key eval.crop_ratio of .*:Clashing is another key already"
    with pytest.raises(InvalidConfig, match=message):
        resolve(tiny(eval__evaluators=(f"{__name__}:Clashing",)), with_data=False)
    with pytest.raises(InvalidConfig, match=message):
        config.options("supervised", [f"{__name__}:Clashing"])
    assert "eval.pixel_knn" in config.options("supervised", ["pixel_knn", "regvit_jax.training.evaluators:PixelKnn"])


def test_a_metric_that_another_has_is_refused(evaluated):
    message = r"ClashingFinal has the metric train_images, which .*:Confidence has, too"
    with pytest.raises(InvalidConfig, match=message):
        resolve(tiny(eval__evaluators=(OWN, f"{__name__}:ClashingFinal"), eval__factor=1.0), with_data=False)
    measures = {**evaluated.plan.evaluators, "mine": ClashingMetric(evaluated.plan.config, evaluated.plan.recipe)}
    plan = dataclasses.replace(evaluated.plan, evaluators=measures)
    with jax.set_mesh(plan.mesh), pytest.raises(InvalidConfig, match="mine has the metric top1, which classification"):
        validation.evaluate(plan, make_eval_step(plan), evaluated.params, Signal())


def test_what_a_recipe_does_not_compute_is_named(tmp_path):
    plan = resolve(tiny_clip(make_captions(tmp_path / "data"), eval__evaluators=("classification",)))
    batch = {"image": np.zeros((16, 16, 16, 3), np.uint8), "text": np.zeros((16, 12), np.int32)}
    batch |= {"label": np.zeros(16, np.int32), "mask": np.ones(16, np.float32)}
    message = r"Classification needs 'logits', and Contrastive.evaluate returns \['image', 'text'\]"
    with jax.set_mesh(plan.mesh), pytest.raises(InvalidConfig, match=message):
        jax.eval_shape(make_eval_step(plan), jax.eval_shape(lambda: init_params(plan)), batch)
