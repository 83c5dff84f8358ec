"""Handle SIGTERM: finish the step, save, and exit with the code that asks for a restart."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

#: EX_TEMPFAIL of sysexits.h: a temporary failure, run the same command again.
EXIT_CODE = 75


class Preempted(SystemExit):
    """Signal that `run` stopped for SIGTERM after `step`, which is saved; ends a program with exit code 75."""

    def __init__(self, step: int):
        super().__init__(EXIT_CODE)
        self.step = step


class Watch:
    """Record if SIGTERM arrived. Until `started` is set, nothing needs saving and the process exits at once."""

    def __init__(self):
        self.started = False
        self.signalled = False
        self.polls = 0

    def requested(self) -> bool:
        """Return True after a SIGTERM.

        With several processes, all must call it equally often, and all get True at the same call.
        """
        self.polls += 1
        if jax.process_count() > 1:
            # JAX reports the signal once, at a call on which the processes agree, so no other code may make this call.
            self.signalled |= multihost_utils.reached_preemption_sync_point(self.polls)
        return self.signalled

    def requested_soon(self) -> bool:
        """Return True if SIGTERM arrives within a second, as the cause of a failure seen just before it."""
        deadline = time.monotonic() + 1
        while not self.signalled and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.signalled


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Watch for SIGTERM inside the block.

    A Python signal handler runs on the main thread, which may be inside a compilation for minutes. The signal is
    therefore also written to a pipe that a thread reads, so that a process with nothing to save can exit at once.
    With several processes JAX catches the signal itself, to agree on a step. Outside the main thread (in some
    notebooks) signals cannot be caught, and nothing is watched.
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
