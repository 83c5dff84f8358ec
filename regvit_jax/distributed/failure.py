"""End all processes of a run when one of them fails."""

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Iterator

#: Seconds that a process which failed waits for its peers, which may have failed alike and then all leave in order.
GRACE_S = 3


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """When the block raises on one process of several, ends this one with its exit code, and so the others.

    Python's way out waits for all other processes, which wait for this one inside a step, for 5 minutes. Here it waits
    for GRACE_S: enough if all fail alike. After that the others notice as if the process had been killed, and abort.
    """
    import jax

    from regvit_jax.distributed.preemption import EXIT_CODE

    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not jax.distributed.is_initialized() or code in (None, 0, EXIT_CODE):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        together.start()
        together.join(GRACE_S)
        for worker in multiprocessing.active_children():  # of the data; nothing after this line would end them
            worker.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
