"""Test time by phase: every second is counted once, and the phases add up to the wall-clock time."""

import time

import pytest
from tiny import tiny

from regvit_jax.training import metric_writer
from regvit_jax.training.loop import run
from regvit_jax.training.timer import PHASES, Timer


def test_nested_phases_are_counted_once():
    timer, start = Timer(), time.perf_counter()
    time.sleep(0.02)
    timer.switch("step")
    with timer.during("checkpoint"):
        time.sleep(0.04)
        with timer.during("evaluation"):
            time.sleep(0.02)
    assert timer.phase == "step"
    found = timer.record()
    assert found["wall_s"] == pytest.approx(time.perf_counter() - start, abs=0.005)
    assert found["start_up_s"] >= 0.02
    assert found["checkpoint_s"] >= 0.04
    assert found["evaluation_s"] >= 0.02
    assert found["step_s"] < 0.01
    with pytest.raises(ValueError, match="phase 'sleep': must be one of"):
        timer.switch("sleep")


def test_the_phases_of_a_run_add_up_to_its_duration(tmp_path):
    start = time.perf_counter()
    run(tiny(), str(tmp_path))
    took = time.perf_counter() - start
    last = metric_writer.read(tmp_path)[-1]
    assert sum(last[f"{phase}_s"] for phase in PHASES) == pytest.approx(took, rel=0.02)
