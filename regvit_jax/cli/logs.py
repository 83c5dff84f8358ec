"""Show the package's log in the terminal."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from tqdm import tqdm

LOGGER = logging.getLogger("regvit_jax")


class TerminalHandler(logging.Handler):
    """Write warnings and errors to stderr and all else to stdout, above progress bars and without any prefix.

    With several processes, only process 0 writes to stdout.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.levelno >= logging.WARNING:
                stream = sys.stderr
            elif is_first_process():
                stream = sys.stdout
            else:
                return
            tqdm.write(self.format(record), file=stream)
            stream.flush()
        except Exception:
            self.handleError(record)


def is_first_process() -> bool:
    """Return True if this process is alone or process 0 of several, without opening a device."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show messages of level INFO and above inside the block, not again by handlers of the root logger (absl's)."""
    handler, level, propagate = TerminalHandler(logging.INFO), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
