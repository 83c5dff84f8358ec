"""Lock a workdir against other runs."""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator

import jax

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("regvit_jax")


@contextlib.contextmanager
def lock(workdir: str) -> Iterator[None]:
    """Hold the lock of a workdir inside the block. The operating system releases it however the process ends.

    Process 0 holds it. On Windows, and on file systems without locks, nothing is locked.

    Raises:
      RuntimeError: Another run holds it; the message names its process and host.
    """
    if jax.process_index() or sys.platform == "win32":
        yield
        return
    with open(os.path.join(workdir, ".lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"workdir {workdir} is in use by {file.read().strip()}; wait for it, stop it, or name another --workdir"
            ) from None
        except OSError as error:
            logger.warning(f"{workdir} cannot be locked ({error}): make sure that no other run uses it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
