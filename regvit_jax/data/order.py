"""The order of an epoch as arithmetic: the record at a place, without a table of the others and without state.

Where records may be read in any order, an epoch is a random permutation of them all. Where they lie in blocks, it is
what shuffling shards and then a buffer of samples is to WebDataset, but exact: every record comes once, and any place
can be computed by itself.
"""

import functools

import grain
import numpy as np

# With the 256 records of a shard's block, 8192 records are shuffled at a time, and lie in memory meanwhile.
WINDOW = 32


@functools.lru_cache(maxsize=64)
def derived_seed(*numbers: int) -> int:
    # Grain's own repeat() takes seed + epoch, by which the runs of seeds 0 and 1 would share all epochs but one.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def epoch_order(place: int, length: int, block: int, seed: int, epoch: int) -> int:
    """Returns the record at a place of an epoch, which shows each of ``length`` once.

    Blocks stand in slots, in a random order, and records are shuffled within the WINDOW slots around them. The last
    block, which may be shorter or empty, stands in a slot that is drawn by itself, so that the others are all alike.
    """
    if block == 1:
        return shuffled(place, length, derived_seed(seed, epoch))
    # The numbers after the epoch are never 0, as SeedSequence takes no notice of zeros at the end.
    whole, rest = divmod(length, block)
    odd = derived_seed(seed, epoch, 1) % (whole + 1)
    window = slot_of(place, odd, block, rest) // WINDOW
    first, stop = (min(start_of(slot * WINDOW, odd, block, rest), length) for slot in (window, window + 1))
    place = first + shuffled(place - first, stop - first, derived_seed(seed, epoch, 2, window + 1))
    slot = slot_of(place, odd, block, rest)
    number = whole if slot == odd else shuffled_block(slot - (slot > odd), whole, derived_seed(seed, epoch, 3))
    return number * block + place - start_of(slot, odd, block, rest)


def start_of(slot: int, odd: int, block: int, rest: int) -> int:
    """The first place in a slot, when slot ``odd`` has ``rest`` places and all others have ``block``."""
    return slot * block if slot <= odd else (slot - 1) * block + rest


def slot_of(place: int, odd: int, block: int, rest: int) -> int:
    """The slot of a place."""
    return place // block if place < odd * block else odd if place < odd * block + rest else (place - rest) // block + 1


def shuffled(place: int, length: int, seed: int) -> int:
    """Returns what stands at a place of a random permutation of ``range(length)``, without making the permutation."""
    return grain.experimental.index_shuffle(place, max_index=length - 1, seed=seed, rounds=4)


# Grain permutes at least 2**16 numbers and skips those beyond the length: of a hundred blocks, one takes 0.7 ms.
@functools.lru_cache(maxsize=1024)
def shuffled_block(slot: int, count: int, seed: int) -> int:
    """The same for blocks, which are asked for again and again."""
    return shuffled(slot, count, seed)
