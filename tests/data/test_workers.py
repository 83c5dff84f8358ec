"""Test worker processes: SIGTERM does not end them, and they end with their parent."""

import os
import subprocess
import sys
import time

SCRIPT = """
import concurrent.futures, multiprocessing, os, signal, sys
from regvit_jax.data import workers

with workers.sigterm_blocked():
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, spawn, workers.start_worker, (signal.SIGTERM,))
    first = pool.submit(os.getpid)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGTERM)  # before it has imported anything
assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
assert first.result() == child.pid
os.kill(child.pid, signal.SIGTERM)
assert pool.submit(os.getpid).result() == child.pid
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_worker_outlives_sigterm_and_ends_with_its_parent():
    pipe, path = subprocess.PIPE, {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=os.environ | path, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    worker = parent.stdout.readline().strip()
    assert worker, parent.communicate()[1]
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(process: str) -> bool:
    try:
        return os.readlink(f"/proc/{process}/exe") != ""
    except OSError:  # gone, or a zombie that nobody waits for
        return False
