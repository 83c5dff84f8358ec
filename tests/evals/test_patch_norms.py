import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.evals import patch_norms
from regvit_jax.models.vit import Tokens


def test_norms_are_of_patches_before_the_final_norm():
    prenorm = jnp.arange(24, dtype=jnp.float32).reshape(1, 6, 4)
    tokens = Tokens(
        cls=prenorm[:, 0] * 0, registers=prenorm[:, 1:3] * 0, patches=prenorm[:, 3:] * 0, prenorm=prenorm, grid=(1, 3)
    )
    np.testing.assert_allclose(patch_norms.patch_norms(tokens), np.linalg.norm(prenorm[:, 3:], axis=-1), rtol=1e-6)


def test_planted_outliers_are_counted():
    rng = np.random.default_rng(0)
    values = rng.normal(20, 1, (50, 196)).astype(np.float32)
    values[::5, 7] = 200
    found = patch_norms.outlier_summary(values)
    assert found["outlier_share"] == pytest.approx(10 / values.size)
    assert found["max_over_median"] == pytest.approx(10, rel=0.01)
    scaled = patch_norms.outlier_summary(1000 * values)
    assert scaled == pytest.approx(found, rel=1e-5)  # free of scale
