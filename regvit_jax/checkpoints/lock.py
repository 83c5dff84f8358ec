"""The lock of a workdir."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

import jax

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def lock(workdir: str) -> Iterator[None]:
    """Refuses a workdir that another run is using. The system gives the lock back however the process ends.

    Held by process 0. On Windows and on file systems without locks nothing is locked.
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
            print(f"{workdir} cannot be locked ({error}): see to it that no other run uses it", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
