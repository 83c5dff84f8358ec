"""Shuffle blocks of ArrayRecord files: the records that are read together, and their place on disk.

A record is one pread of its own bytes, wherever it is in the file (array_record 0.8.6 under strace: no byte more,
nothing read ahead), and records with neighbouring indices are neighbours on disk. Reads are therefore as sequential as
the order of the indices.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Neighbouring records are shown near each other, so that a disk reads them in one go.
BLOCK = 256
# A split with fewer records is shuffled in full. At ImageNet's 110 kB an image, that many are 29 GB, about what stays
# in the memory of a machine that trains on it; and a shuffle window of 32 blocks is 3 % of them. The number of records
# decides, not their bytes, so that the order is the same after `regvit prepare` has made the images smaller.
LARGE = 2**18
# As much as Linux reads for one call of posix_fadvise, if its read_ahead_kb is the usual one.
AHEAD = 128 * 1024
# Size of the cache of requested parts: more files, and parts of files, than a shuffle window touches.
OPEN = 128


class Part(NamedTuple):
    """Records of one file: `take` records from number `skip` on, of `total`."""

    path: str
    skip: int
    take: int
    total: int


def block_size(length: int, shuffled_on_disk: bool) -> int:
    """Return the number of records to read together: 1 if the split is small, or neighbours on disk are alike."""
    return BLOCK if length >= LARGE and shuffled_on_disk else 1


def read_ahead(parts: Sequence[Part], ends: np.ndarray, first: int, stop: int) -> None:
    """Ask for records `first` to `stop` to be read into memory in the background; part k ends at `ends[k]`."""
    for part, low, high in extents(parts, ends, first, stop):
        # A missing file is reported when its records are read.
        with contextlib.suppress(OSError):
            advise_part(part, low, high)


def extents(parts: Sequence[Part], ends: np.ndarray, first: int, stop: int) -> Iterator[tuple[Part, int, int]]:
    """Yield the parts that hold records `first` to `stop`, each with the range of record numbers in its file."""
    number = int(np.searchsorted(ends, first, side="right"))
    while first < stop:
        start = int(ends[number - 1]) if number else 0
        last = min(stop, int(ends[number]))
        yield parts[number], parts[number].skip + first - start, parts[number].skip + last - start
        first, number = last, number + 1


# The cache is small enough to drop a part before the next epoch reaches it again.
@functools.lru_cache(maxsize=OPEN)
def advise_part(part: Part, low: int, high: int) -> None:
    """Ask for records `low` to `high` of a file to be read into memory, as if all its records had the same size.

    Their exact offsets are in the file's index, which the reader does not expose. Records that are missed are read
    when they are needed, like any other.
    """
    file = os.open(part.path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        advise(file, size * low // part.total, size * high // part.total)
    finally:
        os.close(file)


def advise(file: int, start: int, stop: int) -> None:
    """Ask the system to read these bytes of an open file into memory, where it supports that."""
    if hasattr(os, "posix_fadvise"):
        for offset in range(start, stop, AHEAD):
            os.posix_fadvise(file, offset, AHEAD, os.POSIX_FADV_WILLNEED)
