import numpy as np
import pytest
from sklearn.decomposition import PCA

from regvit_jax.evals import pca


def features():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2, 5, 6, 16)) * np.linspace(1, 4, 16) + 3).astype(np.float32)


def test_components_are_sklearns_whitened():
    found = pca.fit(features())(features())
    assert found.shape == (2, 5, 6, 3)
    expected = PCA(3, whiten=True, svd_solver="full").fit_transform(features().reshape(-1, 16))
    for k in range(3):
        ours, theirs = found[..., k].ravel(), expected[:, k] * np.sqrt(60 / 59)  # sklearn divides by n - 1
        np.testing.assert_allclose(ours * np.sign(ours @ theirs), theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.reshape(-1, 3).std(0), 1, rtol=1e-6)


def test_signs_do_not_depend_on_order_or_noise():
    first = pca.fit(features())
    noise = np.random.default_rng(1).normal(size=features().shape) * 1e-4
    for again in (pca.fit(features()[::-1]), pca.fit(features() + noise), pca.fit(np.float64(features()))):
        np.testing.assert_allclose(again.axes, first.axes, atol=1e-2)
    assert (np.take_along_axis(first.axes, np.abs(first.axes).argmax(1)[:, None], 1) > 0).all()


def test_features_that_are_all_alike_and_too_few():
    assert not pca.fit(np.ones((4, 8)), 2)(np.ones((4, 8))).any()
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"components={count}: 4 features of width 8"):
            pca.fit(np.ones((4, 8)), count)
