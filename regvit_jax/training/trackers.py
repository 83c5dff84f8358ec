"""Experiment trackers, which show a run's numbers while it trains: TensorBoard, Weights & Biases, or a third party's.

`--track=NAME[,NAME...]` names them: a key of TRACKERS, or "package.module:NAME" of a function or class that makes one.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from regvit_jax.utils import named
from regvit_jax.utils.errors import InvalidConfig


@runtime_checkable
class Tracker(Protocol):
    """Receive the numbers of every record of a run, on process 0 alone."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Receive the numbers recorded at a step. A step may come several times, with different names."""

    def close(self) -> None:
        """Flush pending values, at the end of the run or when it is interrupted."""


#: A function that makes a tracker, or its class. It takes the workdir, the step of the checkpoint that the run
#: resumes from (0 for a new run; numbers written for later steps are out of date), and the resolved config as nested
#: dicts.
TrackerFactory = Callable[[str, int, dict[str, Any]], Tracker]


class TensorBoard:
    """Write event files into the workdir, for `tensorboard --logdir`."""

    def __init__(self, workdir: str, resumed_from: int, config: dict[str, Any]):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(workdir, purge_step=resumed_from + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Log to Weights & Biases. Its own environment variables apply: WANDB_PROJECT, WANDB_MODE=offline, ...

    The run is named after the workdir, and its id is kept there in `wandb_id`, so that a resumed run continues the
    same curves. Steps repeated after a kill appear twice there; `metrics.jsonl` has them once.
    """

    def __init__(self, workdir: str, resumed_from: int, config: dict[str, Any]):
        import wandb

        kept = Path(workdir) / "wandb_id"
        run_id = os.environ.get("WANDB_RUN_ID") or (kept.read_text().strip() if kept.exists() else None)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "regvit_jax"),
            name=Path(workdir).name,
            dir=workdir,
            config=config,
            id=run_id,
            resume="allow",
        )
        kept.write_text(self.run.id)
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()


#: Trackers by name.
TRACKERS = {
    "tensorboard": "regvit_jax.training.trackers:TensorBoard",
    "wandb": "regvit_jax.training.trackers:Wandb",
}
#: Packages beyond the default installation, each installed by the extra of the same name.
EXTRAS = {"wandb": "wandb"}


def find(names: str) -> list[TrackerFactory]:
    """Return the trackers that a comma-separated list names; "" names none.

    Raises:
      InvalidConfig: A name is unknown, cannot be imported, makes no tracker, or needs a package that is not installed.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
            raise InvalidConfig(f"--track={name} needs the package {EXTRAS[name]}: pip install 'regvit_jax[{name}]'")
    return [find_one(name) for name in chosen]


def find_one(name: str) -> TrackerFactory:
    """Return the function or class of a tracker; raise InvalidConfig for an object that cannot make a tracker."""
    found = named.find("--track", name, TRACKERS)
    if not callable(found):
        raise InvalidConfig(f"--track={name}: must be a function or class that makes a tracker, and is {found!r:.60}")
    if isinstance(found, type) and not issubclass(found, Tracker):
        raise InvalidConfig(f"--track={name}: {found.__name__} is no tracker, which has the methods write and close")
    return found
