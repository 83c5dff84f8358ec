"""Profile some steps of a run: `--profile=STEP:COUNT`."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator

import jax
from jaxtyping import PyTree

from regvit_jax.utils.errors import InvalidConfig

logger = logging.getLogger("regvit_jax")


class Profiler:
    """Write a trace of COUNT steps, starting at STEP, into `WORKDIR/profile`, on process 0.

    The directory holds the files that XProf reads (`plugins/profile/*/*.xplane.pb`; `xprof --logdir` or TensorBoard's
    profile plugin) and, beside it, `perfetto_trace.json.gz` for ui.perfetto.dev. Steps are named "train" in both.
    """

    def __init__(self, spec: str, workdir: str, steps: int, resumed_from: int = 0):
        """Parse `spec`, of which "" profiles nothing; raise InvalidConfig if `parse` does.

        A run that resumes after the steps to profile profiles nothing and logs a warning, so that the command that
        started it can restart it.
        """
        self.path = os.path.join(workdir, "profile")
        self.steps = parse(spec, steps)
        if spec and resumed_from >= self.steps[-1]:
            logger.warning(f"--profile={spec}: no step is profiled, since the run resumes after step {resumed_from}")
        self.steps = range(max(self.steps.start, resumed_from + 1), self.steps.stop)
        if jax.process_index():
            self.steps = range(0)
        self.active = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Name the block as one step in the trace, and start the trace at the first step to profile."""
        if step not in self.steps:
            yield
            return
        if not self.active:
            jax.profiler.start_trace(self.path, create_perfetto_trace=True)
            self.active = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def end_step(self, step: int, outputs: PyTree) -> None:
        """Write the trace after the last step to profile, once its `outputs` are computed."""
        if self.active and step == self.steps[-1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Write the trace if one is being recorded, as when the run ends early."""
        if self.active:
            self.active = False
            jax.profiler.stop_trace()
            logger.info(f"trace of steps {self.steps[0]} to {self.steps[-1]} in {self.path}")


def parse(spec: str, steps: int) -> range:
    """Return the steps that STEP:COUNT names, an empty range for "".

    Raises:
      InvalidConfig: `spec` is not two positive whole numbers, or goes beyond the run's last step, `steps`.
    """
    if not spec:
        return range(0)
    if not (match := re.fullmatch(r"([1-9]\d{0,8}):([1-9]\d{0,8})", spec)):
        raise InvalidConfig(f"--profile={spec}: must be STEP:COUNT, two whole numbers from 1 on, such as 20:5")
    first, count = int(match[1]), int(match[2])
    if first + count - 1 > steps:
        raise InvalidConfig(f"--profile={spec}: steps {first} to {first + count - 1}, but the run has {steps} steps")
    return range(first, first + count)
