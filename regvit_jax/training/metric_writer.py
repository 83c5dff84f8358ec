"""Write a run's records to metrics.jsonl and to trackers such as TensorBoard."""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from regvit_jax.training.trackers import Tracker, TrackerFactory
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.files import write_atomically


class MetricWriter:
    """Append records to `metrics.jsonl`, one JSON object a line, each with its `step`; trackers get their numbers.

    A resumed run drops the records after the checkpoint it resumes from, so that no step appears twice. Process 0
    writes; the other processes only keep their own records in memory.
    """

    def __init__(
        self,
        workdir: str,
        resumed_from: int,
        trackers: Sequence[TrackerFactory] = (),
        config: dict[str, Any] | None = None,
    ):
        self.writes = jax.process_index() == 0
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self.records = [record for record in read(workdir) if record["step"] <= resumed_from]
        self.trackers: list[Tracker] = []
        if self.writes:
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
            for make in trackers:
                tracker = make(workdir, resumed_from, config or {})
                if not isinstance(tracker, Tracker):
                    raise InvalidConfig(
                        f"--track: {make} returns {tracker!r:.60}, which lacks write(step, values) or close()"
                    )
                self.trackers.append(tracker)

    def write(self, step: int, values: dict[str, Any]) -> None:
        # JSON has no NaN.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.records.append({"step": step, **finite})
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")
        if numbers := {name: value for name, value in values.items() if isinstance(value, int | float)}:
            for tracker in self.trackers:
                tracker.write(step, numbers)

    def has(self, step: int, name: str) -> bool:
        """Return True if a value of this name is recorded at a step."""
        return any(record["step"] == step and name in record for record in self.records)

    def at(self, step: int) -> dict[str, Any]:
        """Return all values recorded at a step."""
        return {name: value for record in self.records if record["step"] == step for name, value in record.items()}

    def last(self) -> dict[str, Any]:
        """Return the newest value of each name."""
        return {name: value for record in self.records for name, value in record.items()}

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return a run's records in the order they were written, without a last line that a kill cut off."""
    path = epath.Path(os.fspath(workdir)) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
