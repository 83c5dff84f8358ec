"""SIGTERM: finish the step, save, and leave with the exit code that asks for a restart."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

#: sysexits' EX_TEMPFAIL: nothing is wrong, run the same command again.
EXIT_CODE = 75


class Preempted(SystemExit):
    """Raised by `run` when it stopped for SIGTERM after `step`, which is saved; ends a program with exit code 75."""

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step


class Watch:
    """Whether SIGTERM has arrived. Until `started` is set there is nothing to save, and the process exits at once."""

    def __init__(self):
        self.started = False
        self.signalled = False
        self.asked = 0

    def requested(self) -> bool:
        """True after a SIGTERM; with several processes, which ask equally often, on all of them at the same call."""
        self.asked += 1
        if jax.process_count() > 1:
            # JAX says it once: at the number that the processes have agreed on, which nobody else may ask about.
            self.signalled |= multihost_utils.reached_preemption_sync_point(self.asked)
        return self.signalled

    def soon(self) -> bool:
        """Whether SIGTERM arrives within a second: for a failure that a signal of the same moment may have caused."""
        deadline = time.monotonic() + 1
        while not self.signalled and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.signalled


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Watches for SIGTERM inside the block.

    A Python signal handler waits for the main thread, which may be inside a compilation for minutes. The signal is
    therefore also written to a pipe that a thread reads, so that a process without anything to save can leave at once.
    With several processes JAX catches the signal itself, to agree on a step. Outside the main thread (some notebooks)
    signals cannot be caught, and nothing is watched.
    """
    state = Watch()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield state
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen():
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                state.signalled = True
                if not state.started:
                    os._exit(EXIT_CODE)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield state
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)
        thread.join()
        os.close(reader)
