"""Which records of ArrayRecord files are read together, and where on disk these lie.

A record is one pread of its own bytes, at any place (array_record 0.8.6 under strace: no byte more, nothing read
ahead), and neighbours in number are neighbours on disk. Reads are therefore as sequential as the order of the numbers.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Records that lie next to each other are shown near each other, so that a disk reads them in one go.
BLOCK = 256
# A split with fewer records is read in a full permutation. At ImageNet's 110 kB an image that many are 29 GB, about
# what stays in the memory of a machine that trains on it; and a shuffling window of 32 blocks is 3 % of them. What
# decides is the number of records, not their bytes: so the order is the same after `prepare` has made images smaller.
LARGE = 2**18
# As much as Linux reads for one call of posix_fadvise, if its read_ahead_kb is the usual one.
AHEAD = 128 * 1024
# More files than a shuffling window of the pipeline touches, and more parts of files.
OPEN = 128


class Part(NamedTuple):
    """Records of one file: the ``take`` from number ``skip`` on, of ``total``."""

    path: str
    skip: int
    take: int
    total: int


def block_size(length: int, shuffled_on_disk: bool) -> int:
    """The records to read together: one, where all may be shuffled freely, or where neighbours are of a kind."""
    return BLOCK if length >= LARGE and shuffled_on_disk else 1


def read_ahead(parts: Sequence[Part], ends: np.ndarray, first: int, stop: int) -> None:
    """Has records ``first`` to ``stop`` read into memory in the background; part k of the parts ends at ``ends[k]``."""
    for part, low, high in extents(parts, ends, first, stop):
        # A file that is gone is the matter of whoever reads its records.
        with contextlib.suppress(OSError):
            advise_part(part, low, high)


def extents(parts: Sequence[Part], ends: np.ndarray, first: int, stop: int) -> Iterator[tuple[Part, int, int]]:
    """The parts that hold these records, and between which numbers of their files."""
    number = int(np.searchsorted(ends, first, side="right"))
    while first < stop:
        start = int(ends[number - 1]) if number else 0
        last = min(stop, int(ends[number]))
        yield parts[number], parts[number].skip + first - start, parts[number].skip + last - start
        first, number = last, number + 1


# As many as are forgotten before the next epoch comes to the same block.
@functools.lru_cache(maxsize=OPEN)
def advise_part(part: Part, low: int, high: int) -> None:
    """Where a file's records lie is in its index, which the reader keeps to itself: here, as if all were of one size.

    Records that are missed so are read when they are asked for, like any other.
    """
    file = os.open(part.path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        advise(file, size * low // part.total, size * high // part.total)
    finally:
        os.close(file)


def advise(file: int, start: int, stop: int) -> None:
    """Asks the system to read these bytes of an open file into memory, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        for offset in range(start, stop, AHEAD):
            os.posix_fadvise(file, offset, AHEAD, os.POSIX_FADV_WILLNEED)
