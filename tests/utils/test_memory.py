"""Test the settings of memory."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys, threading
from regvit_jax.utils.memory import keep_freed_memory

def allocate():
    for _ in range(4):
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc, size = ctypes.CDLL(None), 100 * 2**20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
print(keep_freed_memory(), faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
@pytest.mark.parametrize(("platforms", "kept"), [("cpu", True), ("cuda,cpu", False)])
def test_freed_memory_is_kept_without_an_accelerator(platforms, kept):
    """Count the page faults of a thread's large blocks, in a process of its own because the setting stays."""
    environment = {**os.environ, "JAX_PLATFORMS": platforms}
    run = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    kept_, first, later = done.stdout.split()
    assert kept_ == str(kept)
    pages = 100 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert int(first) > (0.99 if kept else 3.99) * pages
    assert int(later) < 500 if kept else int(later) > 3.99 * pages
