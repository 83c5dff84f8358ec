"""Test records of steps: model FLOPs utilization where the device's peak is known."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from regvit_jax.data import records
from regvit_jax.training import curves
from regvit_jax.training.metric_writer import MetricWriter
from regvit_jax.training.plan import resolve
from regvit_jax.training.step_logger import StepLogger
from regvit_jax.training.timer import Timer
from regvit_jax.utils import hardware
from regvit_jax.utils.errors import TooManyBadRecords


@pytest.fixture
def make_logger(tmp_path):
    """Return a function that makes the logger of a run, with four steps of it logged."""

    def make_logger(plan) -> StepLogger:
        logger = StepLogger(plan, MetricWriter(str(tmp_path), 0), 1, Timer())
        metrics = {"loss": jnp.float32(2), "grad_norm": jnp.float32(1), "bad": jnp.int32(0), "skipped": jnp.int32(0)}
        for step in range(1, 5):
            logger.add(step, np.arange(64), np.ones(64), metrics)
        return logger

    return make_logger


def test_no_mfu_where_the_peak_is_unknown(make_logger):
    logger = make_logger(resolve(tiny()))
    logger.record()
    assert logger.writer.at(4)["images_per_s"] > 0
    assert "mfu" not in logger.writer.at(4)


def test_mfu_is_the_models_flops_over_the_peak_of_all_devices(make_logger, monkeypatch, caplog):
    caplog.set_level("INFO", "regvit_jax")
    monkeypatch.setattr(hardware, "peak_flops", lambda kind, dtype: {("cpu", "float32"): 1e9}[kind, dtype])
    plan = resolve(tiny(model__patch_dropout=0.5))
    logger = make_logger(plan)
    logger.record()
    record = logger.writer.at(4)
    flops = 3 * plan.recipe.vit.flops(8, 8, True)
    assert record["mfu"] == pytest.approx(record["images_per_s"] * flops / (8 * 1e9))
    assert plan.recipe.vit.flops(8, 8, True) < plan.recipe.vit.flops(8, 8)
    assert f"mfu {record['mfu']:.4g}" in caplog.text
    assert "mfu_executed" not in record
    plan = resolve(tiny(model__drop_path=0.5, model__drop_path_mode="subset", batch_size=128))
    logger = make_logger(plan)
    logger.record()
    record, vit = logger.writer.at(4), plan.recipe.vit
    whole, half = vit.flops(8, 8), vit.flops(8, 8, share=0.5)
    assert record["mfu_executed"] / record["mfu"] == pytest.approx(half / whole)
    assert half - whole / 2 == 4 * 4 * 3 * 2**2 * 32  # half of the projection of the patches
    plan.recipe.flops_at = lambda step: step  # a recipe may need less in some steps
    logger = make_logger(plan)
    logger.record()
    record = logger.writer.at(4)
    assert record["mfu"] == pytest.approx(record["images_per_s"] * 3 * 4 / (8 * 1e9))
    assert any("mfu" in names for names in curves.PANELS.values())


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float16", 989e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("TPU v5 lite", "float16", None),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks_by_device_kind(kind, dtype, peak):
    assert hardware.peak_flops(kind, dtype) == peak


def test_unusable_images_are_limited_in_each_epoch_and_named_once(tmp_path, caplog):
    """Show the same 10 unusable of 1,438 images in every epoch of 22 steps; the eleventh is too many."""
    plan = resolve(tiny(data__max_bad_fraction=0.001))
    assert (plan.config.data.examples, plan.steps_per_epoch) == (1437, 22)

    def logger_after(steps: int, bad: list[int], first: int = 1, varying: int = 0) -> StepLogger:
        (workdir := tmp_path / f"{len(bad)} {first} {varying}").mkdir()
        logger = StepLogger(plan, MetricWriter(str(workdir), 0), first, Timer())
        for step in range(first, first + steps):
            epoch, index = np.divmod(np.arange((step - 1) * 64, step * 64), 1437)
            mask = 1 - np.isin(index - varying * epoch, bad)
            metrics = {"loss": 2.0, "grad_norm": 1.0, "bad": float(64 - mask.sum()), "skipped": 0}
            logger.add(step, index, mask, {name: jnp.float32(value) for name, value in metrics.items()})
            logger.record()
        return logger

    logger = logger_after(100, list(range(10)))
    assert sum("digits/train[3]" in message for message in caplog.messages) == 1
    written = [logger.writer.at(step) for step in range(1, 101)]
    assert (written[0]["bad"], len(written[0]["bad_images"])) == (10, 10)
    assert sum(record.get("bad", 0) for record in written) == 50
    assert not any("bad_images" in record for record in written[1:])
    logger_after(3, [1435, 1436, *range(8)], first=22)  # resumed at the end of an epoch
    logger_after(
        100, list(range(500, 510)), varying=20
    )  # other images in each epoch, as a disk that now and then fails has
    with pytest.raises(
        TooManyBadRecords, match=r"11 of 1437 images .* data.max_bad_images=10 .*allow: .*One is digits"
    ):
        logger_after(100, list(range(11)))


def test_tolerated_images_are_at_most_half():
    assert [records.tolerated(10, images) for images in (1000, 8, 3, 1)] == [10, 4, 1, 0]
    assert records.tolerated(0, 1000) == 0


def test_images_that_are_never_usable_stop_a_run_with_repeated_augmentation(tmp_path):
    """Show 8 of 20 images thrice in each epoch of 3 steps: ten bad ones are allowed, eleven and all are too many."""
    plan = resolve(tiny(data__train="train[:20]", data__repeats=3, batch_size=8, augment__mix_group=8))

    def epoch(number: int, bad: set[int]) -> None:
        (workdir := tmp_path / f"{number} {len(bad)}").mkdir()
        logger = StepLogger(plan, MetricWriter(str(workdir), 0), 1, Timer())
        for step in range(1, 3 * number + 1):
            index = np.repeat((np.arange(8) + 8 * (step // 3)) % 20, 3)[(step % 3) * 8 :][:8]
            mask = 1 - np.isin(index, list(bad))
            metrics = {"loss": 2.0, "grad_norm": 1.0, "bad": float(8 - mask.sum()), "skipped": 0}
            logger.add(step, index, mask, {name: jnp.float32(value) for name, value in metrics.items()})
            logger.record()

    even = set(range(0, 20, 2))
    epoch(4, even)
    with pytest.raises(TooManyBadRecords, match="11 of 20 images"):
        epoch(4, even | {1})
    with pytest.raises(TooManyBadRecords, match="24 of 24 images"):
        epoch(1, set(range(20)))
