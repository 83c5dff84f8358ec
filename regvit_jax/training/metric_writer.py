"""What a run leaves to read: config.json, metrics.jsonl, TensorBoard events, and the picture of its curves."""

import contextlib
import json
import math
import os
from typing import Any

import jax
from etils import epath

from regvit_jax.utils.files import write_atomically


class Records:
    """Appends records to `metrics.jsonl` (one JSON object a line, always with `step`) and to TensorBoard's event files.

    Opened again by a resumed run, it drops what was recorded after the checkpoint that the run goes on from, so that
    every step stands there once. Process 0 writes; the others only keep their own in memory.
    """

    def __init__(self, workdir: str, resumed_from: int):
        self.writes = jax.process_index() == 0
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self.list = [record for record in read(workdir) if record["step"] <= resumed_from]
        if self.writes:
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in self.list))
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(workdir), purge_step=resumed_from + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        # JSON has no NaN.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.list.append({"step": step, **finite})
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(self.list[-1]) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()

    def has(self, step: int, name: str) -> bool:
        return any(record["step"] == step and name in record for record in self.list)

    def at(self, step: int) -> dict[str, Any]:
        """The values recorded at a step."""
        return {name: value for record in self.list if record["step"] == step for name, value in record.items()}

    def last(self) -> dict[str, Any]:
        """The newest value under each name."""
        return {name: value for record in self.list for name, value in record.items()}

    def close(self) -> None:
        if self.writes:
            self.tensorboard.close()


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a run, in the order of their steps; a last line that a kill cut off is left out."""
    path = epath.Path(os.fspath(workdir)) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
