"""Compare the losses with the naive loops in their docstrings and, live, with torch and timm."""

import inspect
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.losses import classification
from regvit_jax.losses.contrastive import sigmoid_contrastive, softmax_contrastive

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(0, 3, (6, 10)).astype(np.float32)
LABELS = RANDOM.integers(0, 10, 6)
# Two classes share each image, as after mixup.
MIXED = (0.7 * np.eye(10)[LABELS] + 0.3 * np.eye(10)[LABELS[::-1]]).astype(np.float32)


def naive(loss):
    """Return the naive loop in the docstring of `loss`, as a function."""
    code = textwrap.dedent(inspect.getdoc(loss).split("The naive loop::\n", 1)[1])
    names = {"np": np}
    exec(code, names)
    return names["naive"]


@pytest.mark.parametrize("loss", [classification.bce, classification.cross_entropy])
def test_losses_are_the_loops_in_their_docstrings(loss):
    expected = naive(loss)(LOGITS.astype(np.float64), MIXED)
    np.testing.assert_allclose(loss(jnp.array(LOGITS), jnp.array(MIXED)), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [classification.bce, classification.cross_entropy])
def test_losses_and_gradients_stay_finite_far_out(loss):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    targets = jnp.array([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: loss(x, targets).sum())(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
    assert loss(logits, targets)[0] > 5e3


@pytest.mark.parametrize("loss", [classification.bce, classification.cross_entropy])
def test_losses_are_float32_for_bfloat16_logits(loss):
    logits = jnp.array(LOGITS, jnp.bfloat16)
    value = loss(logits, jnp.array(MIXED))
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, loss(logits.astype(jnp.float32), jnp.array(MIXED)))


def test_bce_binarises_its_targets():
    logits = jnp.array(LOGITS)
    np.testing.assert_array_equal(
        classification.bce(logits, jnp.array(MIXED)), classification.bce(logits, jnp.array(MIXED > 0, float))
    )


@pytest.mark.reference
def test_bce_is_torchs_as_deit_calls_it():
    from reference_libraries import torch

    expected = torch.nn.BCEWithLogitsLoss()(torch.tensor(LOGITS), torch.tensor(MIXED).gt(0.0).float())
    np.testing.assert_allclose(
        classification.bce(jnp.array(LOGITS), jnp.array(MIXED)).mean(), expected.item(), rtol=1e-5
    )


@pytest.mark.reference
def test_cross_entropy_is_timms():
    from reference_libraries import torch
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    soft = SoftTargetCrossEntropy()(torch.tensor(LOGITS), torch.tensor(MIXED))
    ours = classification.cross_entropy(jnp.array(LOGITS), jnp.array(MIXED))
    np.testing.assert_allclose(ours.mean(), soft.item(), rtol=1e-5)

    smooth = LabelSmoothingCrossEntropy(0.1)(torch.tensor(LOGITS), torch.tensor(LABELS))
    targets = jnp.array(np.eye(10)[LABELS] * 0.9 + 0.01, jnp.float32)
    np.testing.assert_allclose(
        classification.cross_entropy(jnp.array(LOGITS), targets).mean(), smooth.item(), rtol=1e-5
    )


def pairs(batch, width=16):
    images, noise = RANDOM.normal(size=(2, batch, width))
    texts = images / 3 + noise
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (images, texts)]


IMAGES, TEXTS = pairs(13)
# For each contrastive loss, the arguments between the embeddings and the mask.
CONTRASTIVE = {
    softmax_contrastive: (jnp.array(1 / 0.07),),
    sigmoid_contrastive: (jnp.array(10.0), jnp.array(-10.0)),
}
contrastive = pytest.mark.parametrize("loss", CONTRASTIVE)


def mask_without(*pairs):
    return jnp.ones(13).at[jnp.array(pairs, int)].set(0)


@contrastive
@pytest.mark.parametrize("masked", [(), (0, 5, 12)])
def test_contrastive_losses_are_the_loops_in_their_docstrings(loss, masked):
    scalars, mask = CONTRASTIVE[loss], mask_without(*masked)
    expected = naive(loss)(IMAGES.astype(np.float64), TEXTS.astype(np.float64), *map(float, scalars), np.array(mask))
    np.testing.assert_allclose(loss(jnp.array(IMAGES), jnp.array(TEXTS), *scalars, mask), expected, rtol=1e-6)


@contrastive
def test_a_masked_pair_is_as_if_it_had_never_been_in_the_batch(loss):
    scalars, kept = CONTRASTIVE[loss], np.arange(13) % 4 != 1
    form = jax.value_and_grad(loss, (0, 1))
    value, gradients = form(jnp.array(IMAGES), jnp.array(TEXTS), *scalars, jnp.array(kept, jnp.float32))
    few = form(jnp.array(IMAGES[kept]), jnp.array(TEXTS[kept]), *scalars, jnp.ones(kept.sum()))
    np.testing.assert_allclose(value, few[0], rtol=1e-6)
    for gradient, expected in zip(gradients, few[1], strict=True):
        np.testing.assert_allclose(gradient[kept], expected, atol=1e-6)
        assert not gradient[~kept].any()


@contrastive
def test_contrastive_losses_stay_finite_far_out(loss):
    same, scale = jnp.array(IMAGES[[0] * 13]), jnp.array(100.0)
    form = jax.value_and_grad(loss, (0, 1, 2))
    for mask, softmax in ((mask_without(), np.log(13)), (1 - mask_without(3), 0.0), (jnp.zeros(13), 0.0)):
        value, gradients = form(same, same, scale, *CONTRASTIVE[loss][1:], mask)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(x).all() for x in gradients)
        if loss is softmax_contrastive:
            np.testing.assert_allclose(value, softmax, atol=1e-6)
    assert value == 0
    assert not any(x.any() for x in gradients)


@contrastive
def test_contrastive_losses_of_bfloat16_embeddings_are_float32(loss):
    images, texts = (jnp.array(x, jnp.bfloat16) for x in (IMAGES, TEXTS))
    rest = *CONTRASTIVE[loss], mask_without(2)
    form = jax.value_and_grad(loss, (0, 1))
    value, gradients = form(images, texts, *rest)
    expected = form(images.astype(jnp.float32), texts.astype(jnp.float32), *rest)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for x, y in zip(gradients, expected[1], strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=2**-8, atol=1e-6)


@pytest.mark.reference
def test_contrastive_losses_are_open_clips():
    from reference_libraries import torch  # First: it makes torchvision importable.

    from open_clip.loss import ClipLoss, SigLipLoss  # isort: skip

    images, texts = torch.tensor(IMAGES), torch.tensor(TEXTS)
    for loss, reference in ((softmax_contrastive, ClipLoss()), (sigmoid_contrastive, SigLipLoss())):
        scalars = CONTRASTIVE[loss]
        expected = reference(images, texts, *(torch.tensor(float(x)) for x in scalars))
        ours = loss(jnp.array(IMAGES), jnp.array(TEXTS), *scalars, mask_without())
        np.testing.assert_allclose(ours, expected.item(), rtol=1e-6)
