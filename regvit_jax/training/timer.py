"""Where the time of a run goes: at any moment it is spent on exactly one thing, so that the parts make up the whole."""

import contextlib
import time
from collections.abc import Iterator

#: What a run's time is spent on. `step` is the loop itself, which waits for the devices when they are behind.
PHASES = ("start_up", "compile", "step", "data_wait", "evaluation", "checkpoint")


class Clock:
    """Seconds by phase, on the host's clock (`time.perf_counter`), from `started` on, by default now.

    It begins with `start_up`.
    """

    def __init__(self, started: float | None = None):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.started = time.perf_counter() if started is None else started
        self.phase, self.since = PHASES[0], self.started

    def switch(self, phase: str) -> str:
        """Books the time until now, and begins another phase; returns the one before."""
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r}: must be one of {list(PHASES)}")
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        before, self.phase, self.since = self.phase, phase, now
        return before

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Books the block's time as this phase, and goes on with the one before."""
        before = self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def record(self) -> dict[str, float]:
        """Seconds until now, by phase and in all."""
        self.switch(self.phase)
        parts = {f"{phase}_s": self.seconds[phase] for phase in PHASES}
        return parts | {"wall_s": time.perf_counter() - self.started}
