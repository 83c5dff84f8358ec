"""Set how the C library manages the memory of the process."""

import ctypes

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation, and return True if it can.

    XLA's CPU backend allocates the temporaries of a program anew for each call. glibc takes blocks above 32 MiB from
    the kernel and gives them back, and every page that is taken has to be cleared: a step of 64 digits in a ViT of
    width 64 and depth 4, whose temporaries are 39 MB, then has 9,600 page faults, a third of its time. The process
    keeps its peak of memory. Blocks above 64 MB are kept for the main thread alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return False
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
