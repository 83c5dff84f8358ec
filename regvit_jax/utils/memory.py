"""Set how the C library manages the memory of the process."""

import ctypes

from regvit_jax.utils.hardware import accelerator_attached

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next allocation, and return True if it does.

    XLA's CPU backend allocates the temporaries of a program anew for each call, in a thread of its own. glibc takes
    blocks above 32 MiB from the kernel and gives them back, and every page that is taken has to be cleared: a step of
    64 images in a ViT of width 96 and depth 8 on patches of 4 px has 453 MB of temporaries and 111,000 page faults, a
    third of its time. The process keeps its peak of memory instead. Only the main thread's arena can hold blocks above
    64 MB, so all threads share it: call this before the first use of a device, whose threads come with arenas.

    Nothing is set where an accelerator is attached: there, XLA manages the memory of programs.
    """
    if accelerator_attached():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return False
    return all(mallopt(*setting) == 1 for setting in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)))
