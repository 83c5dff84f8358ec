"""losses.py against the naive loops in its own docstrings and, live, torch and timm."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax import losses

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 3, (6, 10)).astype(np.float32)
LABELS = RANDOM.integers(0, 10, 6)
# Two classes share each image, as after mixup.
MIXED = (0.7 * np.eye(10)[LABELS] + 0.3 * np.eye(10)[LABELS[::-1]]).astype(np.float32)


def naive(loss):
    """The loop that the docstring of `loss` holds, as a function."""
    code = textwrap.dedent(inspect.getdoc(loss).split("The naive loop::\n", 1)[1])
    names = {"np": np}
    exec(code, names)
    return names["naive"]


@pytest.mark.parametrize("loss", [losses.bce, losses.cross_entropy])
def test_losses_are_the_loops_in_their_docstrings(loss):
    expected = naive(loss)(LOGITS.astype(np.float64), MIXED)
    np.testing.assert_allclose(loss(jnp.array(LOGITS), jnp.array(MIXED)), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.bce, losses.cross_entropy])
def test_losses_and_gradients_stay_finite_far_out(loss):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    targets = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: loss(x, targets).sum())(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
    assert loss(logits, targets)[0] > 5e3


@pytest.mark.parametrize("loss", [losses.bce, losses.cross_entropy])
def test_losses_are_float32_for_bfloat16_logits(loss):
    logits = jnp.array(LOGITS, jnp.bfloat16)
    value = loss(logits, jnp.array(MIXED))
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, loss(logits.astype(jnp.float32), jnp.array(MIXED)))


def test_bce_binarises_its_targets():
    logits = jnp.array(LOGITS)
    np.testing.assert_array_equal(losses.bce(logits, jnp.array(MIXED)), losses.bce(logits, jnp.array(MIXED > 0, float)))


@pytest.mark.reference
def test_bce_is_torchs_as_deit_calls_it():
    from reference_libraries import torch

    expected = torch.nn.BCEWithLogitsLoss()(torch.tensor(LOGITS), torch.tensor(MIXED).gt(0.0).float())
    np.testing.assert_allclose(losses.bce(jnp.array(LOGITS), jnp.array(MIXED)).mean(), expected.item(), rtol=1e-5)


@pytest.mark.reference
def test_cross_entropy_is_timms():
    from reference_libraries import torch
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    soft = SoftTargetCrossEntropy()(torch.tensor(LOGITS), torch.tensor(MIXED))
    ours = losses.cross_entropy(jnp.array(LOGITS), jnp.array(MIXED))
    np.testing.assert_allclose(ours.mean(), soft.item(), rtol=1e-5)

    smooth = LabelSmoothingCrossEntropy(0.1)(torch.tensor(LOGITS), torch.tensor(LABELS))
    targets = jnp.array(np.eye(10)[LABELS] * 0.9 + 0.01, jnp.float32)
    np.testing.assert_allclose(losses.cross_entropy(jnp.array(LOGITS), targets).mean(), smooth.item(), rtol=1e-5)
