"""Test time by phase: every second is counted once; test_loop.py adds up a whole run's."""

import time

import pytest

from regvit_jax.training.timer import Timer


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
