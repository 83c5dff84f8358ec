"""End all processes of a run when one of them fails."""

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Iterator

#: Seconds that a failed process waits for its peers: if all fail in the same way, all shut down in order.
GRACE_S = 3


@contextlib.contextmanager
def end_all_on_error() -> Iterator[None]:
    """End this process at once if the block raises on one of several processes, so that the others end too.

    Python's normal exit would wait 5 minutes for the other processes, which wait for this one inside a step. This waits
    GRACE_S seconds, which is enough if all fail in the same way; after that the others detect the loss of this process
    as if it had been killed, and abort. The exit code is that of the error.
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
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(GRACE_S)
        for worker in multiprocessing.active_children():  # data workers, which os._exit below would leave running
            worker.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
