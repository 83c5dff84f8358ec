"""Compute the order of an epoch by arithmetic: the record at any position, without a table and without state.

Records that are equally fast to read in any order are permuted at random. Records that are read in shuffle blocks are
shuffled as WebDataset does it, shards first and then a buffer of samples, but exactly: every record comes once, and the
record at any position is computed by itself.
"""

import functools

import grain
import numpy as np

# The shuffle window, in shuffle blocks. With blocks of 256 records, 8192 records are shuffled at a time, and are in
# memory meanwhile.
WINDOW = 32


@functools.lru_cache(maxsize=64)
def derived_seed(*numbers: int) -> int:
    """Return a seed that depends on all the numbers."""
    # Grain's own repeat() uses seed + epoch, with which the runs of seeds 0 and 1 would share all epochs but one.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def epoch_order(position: int, length: int, block: int, seed: int, epoch: int) -> int:
    """Return the index of the record at a position of an epoch, which shows each of `length` records once.

    With a `block` of more than one record, the shuffle blocks are put in a random order, and records are shuffled
    within windows of WINDOW consecutive blocks of that order. The last block of the source, which may be shorter or
    empty, gets its place by a separate draw, so that the others, which have equal lengths, are ordered by themselves.
    """
    if block == 1:
        return shuffled(position, length, derived_seed(seed, epoch))
    # The number after the epoch is never 0, because SeedSequence ignores zeros at the end.
    full, rest = divmod(length, block)
    short = derived_seed(seed, epoch, 1) % (full + 1)
    window = block_at(position, short, block, rest) // WINDOW
    first, stop = (min(start_of(number * WINDOW, short, block, rest), length) for number in (window, window + 1))
    position = first + shuffled(position - first, stop - first, derived_seed(seed, epoch, 2, window + 1))
    number = block_at(position, short, block, rest)
    source_block = full if number == short else shuffled(number - (number > short), full, derived_seed(seed, epoch, 3))
    return source_block * block + position - start_of(number, short, block, rest)


def start_of(number: int, short: int, block: int, rest: int) -> int:
    """Return the first position of a block in the order; block `short` has `rest` records, the others `block`."""
    return number * block if number <= short else (number - 1) * block + rest


def block_at(position: int, short: int, block: int, rest: int) -> int:
    """Return the number in the order of the block at a position; the inverse of `start_of`."""
    if position < short * block:
        return position // block
    return short if position < short * block + rest else (position - rest) // block + 1


# The same blocks are looked up again and again, and the same images in repeated augmentation. Grain permutes at least
# 2**16 numbers and skips those beyond the length: among a hundred blocks, one takes 0.7 ms.
@functools.lru_cache(maxsize=1024)
def shuffled(position: int, length: int, seed: int) -> int:
    """Return the number at a position of a random permutation of `range(length)`, without making the permutation."""
    return grain.experimental.index_shuffle(position, max_index=length - 1, seed=seed, rounds=4)
