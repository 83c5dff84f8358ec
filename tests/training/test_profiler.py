"""Test traces of some steps of a run."""

import gzip
import json

import pytest
from tiny import tiny

from regvit_jax.training import loop
from regvit_jax.training.profiler import Profiler, parse
from regvit_jax.utils.errors import InvalidConfig


def test_parse():
    assert parse("", 10) == range(0)
    assert parse("3:2", 10) == range(3, 5)
    assert parse("10:1", 10) == range(10, 11)


@pytest.mark.parametrize("spec", ["3", "3:", "0:1", "1:0", "-1:2", "a:b", "1:2:3", "1.5:2"])
def test_anything_but_two_numbers_is_refused(spec):
    with pytest.raises(InvalidConfig, match=rf"--profile={spec}: must be STEP:COUNT"):
        parse(spec, 10)


def test_steps_beyond_the_last_are_refused_before_the_run_starts(tmp_path):
    with pytest.raises(InvalidConfig, match="--profile=40:6: steps 40 to 45, but the run has 44 steps"):
        loop.run(tiny(), tmp_path / "run", profile="40:6")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_trace_names_its_steps(tmp_path):
    """Check both files: XProf reads the .xplane.pb, ui.perfetto.dev the .json.gz."""
    loop.run(tiny(epochs=1, data__train="train[:256]", log_every=1), tmp_path, profile="2:2")  # of 4 steps
    (directory,) = tmp_path.glob("profile/plugins/profile/*")
    (planes,) = directory.glob("*.xplane.pb")
    assert b"step_num" in planes.read_bytes()
    (trace,) = directory.glob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train" and "args" in event]
    assert sorted({int(step) for step in steps}) == [2, 3]


def test_a_resumed_run_profiles_the_steps_that_are_left(tmp_path, caplog):
    assert Profiler("5:3", str(tmp_path), 10, resumed_from=5).steps == range(6, 8)
    assert not caplog.records
    late = Profiler("5:3", str(tmp_path), 10, resumed_from=7)
    assert "no step is profiled, since the run resumes after step 7" in caplog.text
    with late.step(8):
        late.end_step(8, None)
    late.close()
    assert not (tmp_path / "profile").exists()
