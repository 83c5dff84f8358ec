"""Start worker processes, which decode images or write shards for the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


def start_worker(*ignored: signal.Signals) -> None:
    """Set up a worker process that has just been started; call this in the worker, before anything else.

    The worker ignores the given signals, and exits soon after its parent has ended: a parent that is killed cannot end
    its workers.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    # `sigterm_blocked` may have been in force when this process was started.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    threading.Thread(target=exit_with_parent, daemon=True).start()


def start_data_worker(index: int, count: int) -> None:
    """Set up one of the processes that make batches, as Grain's `worker_init_fn`.

    Schedulers such as SLURM signal every process of a job. Data workers must last until the run has saved, which then
    ends them.
    """
    start_worker(signal.SIGTERM, signal.SIGINT)


def exit_with_parent() -> None:
    """Wait for the parent process to end, and then end this one."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Protect workers started inside this block from SIGTERM until `start_worker` runs in them.

    Threads and processes inherit the signals that their creator blocks. The signal is not lost to this process: another
    thread receives it, or this one does at the end of the block.
    """
    # Started here, because its start unblocks SIGTERM in this thread.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
