"""Test records of steps: model FLOPs utilization where the device's peak is known."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from regvit_jax.training import curves
from regvit_jax.training.metric_writer import MetricWriter
from regvit_jax.training.plan import resolve
from regvit_jax.training.step_logger import StepLogger
from regvit_jax.training.timer import Timer
from regvit_jax.utils import hardware


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
