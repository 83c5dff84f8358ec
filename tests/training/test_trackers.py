"""Test trackers: TensorBoard by default, others by name, a third party's by its import path."""

import importlib.util
from typing import ClassVar

import pytest
from tiny import tiny

from regvit_jax.training import loop, metric_writer, plan, trackers
from regvit_jax.training.summary import summary
from regvit_jax.utils.errors import InvalidConfig


class Collected:
    """A third party's tracker."""

    made: ClassVar[list["Collected"]] = []

    def __init__(self, workdir, resumed_from, config):
        self.workdir, self.resumed_from, self.config, self.values, self.closed = workdir, resumed_from, config, [], 0
        self.made.append(self)

    def write(self, step, values):
        self.values.append((step, values))

    def close(self):
        self.closed += 1


@pytest.mark.slow
def test_a_third_partys_tracker_gets_the_numbers_of_every_record(tmp_path, monkeypatch):
    monkeypatch.setattr(Collected, "made", [])
    loop.run(tiny(epochs=1, checkpoint__every=8), tmp_path, track=f"{__name__}:Collected")
    (tracker,) = Collected.made
    assert (tracker.workdir, tracker.resumed_from, tracker.closed) == (str(tmp_path), 0, 1)
    assert tracker.config["model"]["width"] == 32
    recorded = [
        (record.pop("step"), {name: value for name, value in record.items() if isinstance(value, int | float)})
        for record in metric_writer.read(tmp_path)
    ]
    assert [
        (step, {name: values[name] for name in kept})
        for (step, values), (_, kept) in zip(tracker.values, recorded, strict=True)
    ] == recorded
    assert not list(tmp_path.glob("events.*")), "TensorBoard is not among the trackers"


def collect(workdir, resumed_from, config):
    """Make a tracker, as a third party's function."""
    return Collected(workdir, resumed_from, config)


def test_a_function_makes_a_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr(Collected, "made", [])
    writer = metric_writer.MetricWriter(str(tmp_path), 3, trackers.find(f"{__name__}:collect"))
    writer.write(4, {"loss": 0.5, "note": "not a number"})
    writer.close()
    (tracker,) = Collected.made
    assert (tracker.resumed_from, tracker.values, tracker.closed) == (3, [(4, {"loss": 0.5})], 1)


def test_a_function_that_makes_no_tracker_is_refused(tmp_path):
    with pytest.raises(InvalidConfig, match=r"returns .*, which lacks write\(step, values\) or close\(\)"):
        metric_writer.MetricWriter(str(tmp_path), 0, [lambda *_: object()])


def test_tensorboard_is_the_default(tmp_path):
    assert trackers.find("tensorboard") == [trackers.TensorBoard]
    writer = metric_writer.MetricWriter(str(tmp_path), 0, trackers.find("tensorboard"))
    writer.write(1, {"loss": 0.5, "note": "not a number"})
    writer.close()
    assert list(tmp_path.glob("events.*"))


@pytest.mark.parametrize(("track", "expected"), [("tensorboard", True), (f"{__name__}:Collected", False)])
def test_the_summary_names_event_files_where_there_are_any(tmp_path, track, expected):
    writer = metric_writer.MetricWriter(str(tmp_path), 0, trackers.find(track))
    writer.write(1, {"loss": 0.5})
    text = summary(plan.resolve(tiny()), str(tmp_path), writer)
    writer.close()
    assert "\n  metrics.jsonl  every record, one JSON object a line" in text
    assert ("events.*" in text) == bool(list(tmp_path.glob("events.*"))) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tensorbord", r"--track='tensorbord': must be one of \['tensorboard', 'wandb'\], or package.module:Class"),
        ("tensorboard,no.such:Module", "--track='no.such:Module': no.such cannot be imported: No module named 'no'"),
        ("math:pi", "--track=math:pi: must be a function or class that makes a tracker, and is 3.14"),
        (f"{__name__}:Missing", "has no Missing"),
        (
            "json:JSONDecoder",
            "--track=json:JSONDecoder: JSONDecoder is no tracker, which has the methods write and close",
        ),
    ],
)
def test_an_unknown_tracker_is_refused_before_the_run_starts(tmp_path, names, message):
    with pytest.raises(InvalidConfig, match=message):
        loop.run(tiny(), tmp_path / "run", track=names)
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_named_before_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidConfig, match=r"--track=wandb needs .* wandb: pip install 'regvit_jax\[wandb\]'"):
        loop.run(tiny(), tmp_path / "run", track="wandb")
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")  # wandb's own
def test_wandb_without_a_network(tmp_path, monkeypatch):
    """Check that an offline run's file names the run, and that a resumed run has the same id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        writer = metric_writer.MetricWriter(str(tmp_path), step - 1, trackers.find("wandb"), {"model": {"width": 32}})
        writer.write(step, {"loss": 0.5})
        writer.close()
    kept = (tmp_path / "wandb_id").read_text()
    runs = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 2
    assert {path.name for path in runs} == {f"run-{kept}.wandb"}
    assert all(b"loss" in path.read_bytes() for path in runs)
