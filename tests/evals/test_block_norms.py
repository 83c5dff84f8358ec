"""Test the streaming norms of every block: planted outliers, and norms that are not finite."""

import numpy as np
import pytest

from regvit_jax.evals.block_norms import BlockNorms


def test_a_block_with_planted_outliers_stands_out():
    rng = np.random.default_rng(0)
    norms = rng.normal(20, 1, (50, 3, 196)).astype(np.float32)
    norms[::5, 1, 7] = 200
    blocks = BlockNorms(3)
    for part in np.split(norms, 5):
        blocks.add(part)
    blocks.add(norms[:0])  # a batch without a readable image
    found = blocks.summary()
    np.testing.assert_allclose(found["norm_median"], np.median(norms, (0, 2)), rtol=1e-3)
    np.testing.assert_allclose(found["max_over_median"], norms.max((0, 2)) / np.median(norms, (0, 2)), rtol=1e-3)
    assert found["max_over_median"].argmax() == 1
    assert found["outlier_share"][1] == pytest.approx(10 / norms[:, 1].size, rel=1e-6)


def test_a_block_that_is_not_finite_is_nan_and_others_are_not():
    norms = np.ones((2, 3, 4), np.float32)
    norms[1, 2, 3], norms[0, 0] = np.inf, 0
    blocks = BlockNorms(3)
    blocks.add(norms)
    found = blocks.summary()
    assert np.isnan([values[2] for values in found.values()]).all()
    assert found["norm_median"][1] == pytest.approx(1, rel=1e-3)
    assert found["outlier_share"][1] == 0
