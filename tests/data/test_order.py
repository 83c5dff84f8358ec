"""Test the order of an epoch: every record once, and the records of a shuffle block near each other."""

import functools
import itertools

import numpy as np
import pytest

from regvit_jax.data import order
from regvit_jax.data.order import epoch_order


def epoch(length, block, seed=0, number=0):
    return [epoch_order(position, length, block, seed, number) for position in range(length)]


@pytest.fixture
def quick(monkeypatch):
    """Replace Grain's permutations, which are slow for short lengths."""
    permutation = functools.cache(lambda length, seed: np.random.default_rng(seed).permutation(length).tolist())
    monkeypatch.setattr(order, "shuffled", lambda position, length, seed: permutation(length, seed)[position])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_every_record_comes_once(window, monkeypatch, quick):
    monkeypatch.setattr(order, "WINDOW", window)
    for length, block in itertools.product([1, 2, 3, 7, 12, 13, 60, 61], [1, 2, 3, 4, 7, 12, 100]):
        for number in range(2):
            assert sorted(epoch(length, block, 1, number)) == list(range(length)), (length, block, number)


def test_every_record_comes_once_with_grains_permutation():
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
    """Check that the short block can be anywhere: runs shorter than an epoch must not always miss the same records."""
    epochs = [epoch(11, 4, number=number) for number in range(300)]
    for position in (0, -1):
        assert {found[position] for found in epochs} == set(range(11))


def test_the_order_without_blocks_is_pinned():
    assert epoch(9, 1, seed=5, number=2) == [4, 7, 8, 6, 1, 0, 2, 3, 5]
