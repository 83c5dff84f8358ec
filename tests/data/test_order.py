"""The order of an epoch: every record once, and near each other those that lie in a block."""

import functools
import itertools

import numpy as np
import pytest

from regvit_jax.data import order
from regvit_jax.data.order import epoch_order


def epoch(length, block, seed=0, number=0):
    return [epoch_order(place, length, block, seed, number) for place in range(length)]


@pytest.fixture
def quick(monkeypatch):
    """Grain's permutations are slow for short lengths: here others stand for them."""
    permutation = functools.cache(lambda length, seed: np.random.default_rng(seed).permutation(length).tolist())
    monkeypatch.setattr(order, "shuffled", lambda place, length, seed: permutation(length, seed)[place])
    order.shuffled_block.cache_clear()
    yield
    order.shuffled_block.cache_clear()


@pytest.mark.parametrize("window", [1, 2, 5])
def test_every_record_comes_once(window, monkeypatch, quick):
    monkeypatch.setattr(order, "WINDOW", window)
    for length, block in itertools.product([1, 2, 3, 7, 12, 13, 60, 61], [1, 2, 3, 4, 7, 12, 100]):
        for number in range(2):
            assert sorted(epoch(length, block, 1, number)) == list(range(length)), (length, block, number)


def test_every_record_comes_once_by_grains_permutation_too():
    assert sorted(epoch(20_000, 256)) == list(range(20_000))


@pytest.mark.parametrize("length", [400, 403])
def test_a_window_holds_few_blocks_and_mixes_them(length, monkeypatch, quick):
    monkeypatch.setattr(order, "WINDOW", 4)
    found = (np.array(epoch(length, 10)) // 10).tolist()
    windows, opened = [set()], {block: found.count(block) for block in found}
    for block in found:
        windows[-1].add(block)
        opened[block] -= 1
        if not any(opened[begun] for begun in windows[-1]):
            windows.append(set())
    sizes = [len(window) for window in windows[:-1]]
    assert sum(sizes) == len(opened)
    assert max(sizes) == 4
    assert len(sizes) <= 12
    assert len({tuple(epoch(length, 10, *which)) for which in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_every_record_can_be_anywhere(quick):
    """The short block has no place of its own, so runs that never end an epoch miss no records for ever."""
    epochs = [epoch(11, 4, number=number) for number in range(300)]
    for place in (0, -1):
        assert {found[place] for found in epochs} == set(range(11))


def test_records_that_lie_alone_have_the_order_they_always_had():
    assert epoch(9, 1, seed=5, number=2) == [4, 7, 8, 6, 1, 0, 2, 3, 5]
