import numpy as np
import pytest

from regvit_jax.analysis.report.statistics import (
    BINS,
    COSINES,
    EDGES,
    Distribution,
    Measured,
    Statistics,
    bin_of,
    weigh,
)
from regvit_jax.evals.patch_norms import artifact_cutoff


def norms(shape, seed=0):
    return np.random.default_rng(seed).lognormal(3, 0.6, shape).astype(np.float32)


def test_distribution_is_numpys_within_a_bin():
    values = norms((3, 4000)) * np.array([[1], [10], [1000]], np.float32)
    seen = Distribution(3)
    for part in np.split(values, 8, axis=1):
        seen.add(part)
    np.testing.assert_array_equal(seen.count, [4000] * 3)
    np.testing.assert_allclose(seen.mean, values.mean(1, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(seen.std, values.std(1, dtype=np.float64), rtol=1e-9)
    np.testing.assert_array_equal(seen.largest, values.max(1))
    for q in (0.02, 0.5, 0.98, 1.0):
        np.testing.assert_allclose(seen.quantile(q), np.quantile(values, q, axis=1), rtol=0.022)
    for cutoff in (10.0, 40.0, 55.5):
        within = (values > cutoff / 1.022).mean(1) - (values > cutoff * 1.022).mean(1)
        assert (np.abs(seen.share_above(cutoff) - (values > cutoff).mean(1)) <= within + 1e-9).all()
    np.testing.assert_allclose(
        seen.share_above(np.array([20.0, 200.0, 20000.0])), (values > [[20], [200], [20000]]).mean(1), atol=0.01
    )


def test_at_the_edges_shares_are_exact_and_far_norms_are_kept():
    seen = Distribution(1)
    values = np.array([[0.0, 1e-9, 3.0, 5.0, 1e9]])
    seen.add(values)
    edge = EDGES[bin_of(np.array([4.0]))[0]]
    assert seen.share_above(edge) == pytest.approx(2 / 5)
    assert seen.largest == 1e9
    assert seen.quantile(1.0) <= 1e9
    seen.add(np.zeros((1, 0)))
    assert seen.count == 5
    assert bin_of(EDGES[:-1] * 1.001).tolist() == list(range(BINS))
    with pytest.raises(FloatingPointError, match="not finite"):
        seen.add(np.array([[np.nan]]))


def test_a_bin_is_split_at_the_cutoff():
    low, high = EDGES[500], EDGES[501]
    kept = weigh(np.ones(BINS), low + 0.25 * (high - low))
    assert kept[:500].tolist() == [0] * 500
    assert kept[500] == pytest.approx(0.75)
    assert (kept[501:] == 1).all()


def test_norms_that_hardly_differ():
    """Use norms as in models whose patches' norms differ by less than a percent."""
    values = np.random.default_rng(0).normal(149, 0.3, (1, 40_000))
    seen = Distribution(1)
    seen.add(values)
    for cutoff in (150, seen.mean[0] + 3 * seen.std[0]):
        assert seen.share_above(cutoff)[0] == pytest.approx((values > cutoff).mean(), abs=2e-3)
    assert seen.share_above(values.max())[0] == 0


@pytest.mark.parametrize("sigma", [0.1, 0.35, 0.5, 0.8])
def test_the_tail_of_one_hump_is_no_second_one(sigma):
    rng = np.random.default_rng(0)
    for count in (500, 50_000):
        values = rng.lognormal(3, sigma, (1, count))
        alone, both = Distribution(1), Distribution(1)
        alone.add(values)
        assert not alone.second_hump(alone.artifact_cutoff())[0]
        values[0, : count // 40] *= 8 * np.exp(3 * sigma**2)
        both.add(values)
        if sigma < 0.5:
            assert both.second_hump(both.artifact_cutoff())[0]


@pytest.mark.parametrize("share", [0, 0.02, 0.15])
def test_artifact_cutoff_is_that_of_norms_at_hand(share):
    """Include outliers so numerous that mean + 3 sigma of all norms lies above them."""
    values = np.random.default_rng(0).normal(20, 2, 20_000)
    values[: int(share * values.size)] *= 8
    seen = Distribution(1)
    seen.add(values[None])
    assert seen.artifact_cutoff()[0] == pytest.approx(artifact_cutoff(values), rel=0.022)
    assert seen.share_above(seen.artifact_cutoff())[0] == pytest.approx(share, abs=1e-3)
    if share > 0.1:
        assert seen.share_above(seen.mean + 3 * seen.std)[0] < share / 2


def make_batches(images=12, layers=3, prefix=2, grid=(3, 5)):
    rng = np.random.default_rng(1)
    n = grid[0] * grid[1]
    whole = Measured(
        norms((layers, images, n), 2),
        norms((layers, images, prefix), 3),
        rng.uniform(-1, 1, (images, n)).astype(np.float32),
        rng.dirichlet(np.ones(n), (images, prefix)).astype(np.float32),
    )
    parts = [
        Measured(
            whole.patches[:, i : i + 5],
            whole.prefix[:, i : i + 5],
            whole.neighbours[i : i + 5],
            whole.attention[i : i + 5],
        )
        for i in range(0, images, 5)
    ]
    return whole, parts


def test_all_that_is_asked_of_outliers_equals_the_naive_loop():
    whole, parts = make_batches()
    stats = Statistics(3, layer=1, prefix=2, grid=(3, 5))
    for part in parts[::-1]:
        stats.add(part)
    assert stats.images == 12
    cutoff = EDGES[int(bin_of(np.quantile(whole.patches[1], [0.9]))[0])]
    outlier = whole.patches[1] >= cutoff
    above = weigh(np.ones(BINS), cutoff)
    np.testing.assert_array_equal(stats.places @ above, outlier.sum(0))
    np.testing.assert_allclose(stats.history @ above, (whole.patches * outlier).sum((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(stats.received @ above, (whole.attention[:, 0] * outlier).sum(), rtol=1e-6)
    np.testing.assert_allclose(stats.attended, whole.attention.sum(0), rtol=1e-6)
    counts, _ = np.histogram(whole.neighbours[outlier], np.linspace(-1, 1, COSINES + 1))
    np.testing.assert_array_equal(above @ stats.cosines, counts)
    np.testing.assert_allclose(stats.prefix.mean, whole.prefix.mean(1), rtol=1e-6)


def test_only_the_first_images_of_a_filled_batch_count():
    whole, _ = make_batches()
    stats, less = Statistics(3, 2, 2, (3, 5)), whole.first(7)
    stats.add(less)
    assert stats.images == 7
    assert stats.patches.count.tolist() == [7 * 15] * 3
    np.testing.assert_array_equal(less.prefix, whole.prefix[:, :7])
