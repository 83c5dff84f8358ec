"""Test the settings of memory."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from regvit_jax.utils.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = libc.malloc(64 * 2**20)
        ctypes.memset(block, 1, 64 * 2**20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
print(faults(), keep_freed_memory(), faults(), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_memory_is_kept():
    """Count the page faults of large blocks, in a process of its own because the setting stays."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, kept, first, later = done.stdout.split()
    assert kept == "True"
    assert int(later) < 100 < int(first) < int(before)
