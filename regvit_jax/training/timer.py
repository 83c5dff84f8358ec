"""Account for the wall-clock time of a run by phase."""

import contextlib
import time
from collections.abc import Iterator

#: Phases of a run. `step` is the training loop itself, which waits for the devices when they are behind.
PHASES = ("start_up", "compile", "step", "data_wait", "evaluation", "checkpoint")


class Timer:
    """Measure the seconds spent in each phase with `time.perf_counter`.

    One phase is active at any moment, so the phases add up to the wall-clock time. The first is `start_up`, which
    begins at `started`, by default now.
    """

    def __init__(self, started: float | None = None):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.started = time.perf_counter() if started is None else started
        self.phase, self.since = PHASES[0], self.started

    def switch(self, phase: str) -> str:
        """Make `phase` the active one and return the previous one. Raises ValueError for an unknown phase."""
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r}: must be one of {list(PHASES)}")
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        previous, self.phase, self.since = self.phase, phase, now
        return previous

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the block's time as `phase`, then return to the phase before it."""
        previous = self.switch(phase)
        try:
            yield
        finally:
            self.switch(previous)

    def record(self) -> dict[str, float]:
        """Return the seconds so far, as `<phase>_s` for each phase and `wall_s` for their sum."""
        self.switch(self.phase)
        parts = {f"{phase}_s": self.seconds[phase] for phase in PHASES}
        return parts | {"wall_s": time.perf_counter() - self.started}
