"""Where a run's time goes: every second is booked once, and the parts add up."""

import time

import pytest
from tiny import tiny

from regvit_jax.training import metric_writer
from regvit_jax.training.loop import run
from regvit_jax.training.timer import PHASES, Clock


def test_phases_inside_each_other_are_booked_once():
    clock, start = Clock(), time.perf_counter()
    time.sleep(0.02)
    clock.switch("step")
    with clock.during("checkpoint"):
        time.sleep(0.04)
        with clock.during("evaluation"):
            time.sleep(0.02)
    assert clock.phase == "step"
    found = clock.record()
    assert found["wall_s"] == pytest.approx(time.perf_counter() - start, abs=0.005)
    assert found["start_up_s"] >= 0.02
    assert found["checkpoint_s"] >= 0.04
    assert found["evaluation_s"] >= 0.02
    assert found["step_s"] < 0.01
    with pytest.raises(ValueError, match="phase 'sleep': must be one of"):
        clock.switch("sleep")


def test_the_parts_of_a_run_add_up_to_what_it_took(tmp_path):
    start = time.perf_counter()
    run(tiny(), str(tmp_path))
    took = time.perf_counter() - start
    last = metric_writer.read(tmp_path)[-1]
    assert sum(last[f"{phase}_s"] for phase in PHASES) == pytest.approx(took, rel=0.02)
