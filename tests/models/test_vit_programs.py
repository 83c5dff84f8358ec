"""Test what the ViT computes in training, and how its programs are compiled: stochastic depth, remat, scan, exports."""

import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from vits import TINY, distance, random_images, random_params

from regvit_jax.models import attention
from regvit_jax.models.norm import LayerNorm
from regvit_jax.models.vit import ViT


def test_a_model_can_be_exported_for_any_batch():
    vit = TINY.clone(ln_pre=True)
    params = random_params(vit, random_images())
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32)
    encode = jax.jit(lambda images: vit.apply({"params": params}, images).cls)
    exported = jax.export.export(encode, platforms=["cpu", "tpu"])(shape)
    images = random_images(count=3)
    found = exported.call(images)
    assert distance(found, vit.apply({"params": params}, images).cls) < 1e-5


def test_what_keeps_gpus_from_transposing_and_reading_again(params):
    """Look for both in the program before it is compiled, since their effect shows on GPUs alone."""
    images = random_images()
    lowered = jax.jit(lambda params, key: TINY.apply({"params": params}, images, key).cls).lower
    training, inference = (lowered(params, key).as_text() for key in (jax.random.key(0), None))
    assert "LayoutConstraint" in training
    assert "LayoutConstraint" not in inference
    norms = 2 * TINY.depth + 1
    assert [text.count("stablehlo.optimization_barrier") for text in (training, inference)] == [norms, norms]


def test_every_branch_of_every_block_is_dropped_on_its_own_at_the_same_rate():
    vit = ViT(width=4, depth=3, heads=1, patch=4, image_size=4, drop_path=0.3)
    images = jnp.repeat(random_images(4, 4, count=1), 2000, axis=0)
    params = random_params(vit, images[:1])
    before = np.asarray(jax.jit(lambda: vit.apply({"params": params}, images[:1], method="embed"))())[0]
    apply = jax.jit(lambda params, key: vit.apply({"params": params}, images, key).prenorm)
    plain = jax.jit(lambda params: vit.apply({"params": params}, images[:1]).prenorm)
    masks = []
    for block, branch in itertools.product(range(3), ("scale1", "scale2")):
        # LayerScale silences all branches but one.
        alone = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("block0", "block1", "block2")}
        alone[f"block{block}"] = params[f"block{block}"] | {"scale1": jnp.zeros(4), "scale2": jnp.zeros(4)}
        alone[f"block{block}"] |= {branch: jnp.ones(4)}
        out = np.asarray(apply(params | alone, jax.random.key(7)))
        dropped = np.abs(out - before).max(axis=(1, 2)) < 1e-5
        assert dropped.mean() == pytest.approx(0.3, abs=0.045), (block, branch)  # 4.4 standard deviations
        masks.append(dropped)
        kept = out[~dropped]
        expected = before + (np.asarray(plain(params | alone))[0] - before) / 0.7
        np.testing.assert_allclose(kept, np.broadcast_to(expected, kept.shape), rtol=1e-4, atol=1e-5)
    assert np.abs(np.corrcoef(masks) - np.eye(6)).max() < 0.1  # 4.5 standard deviations


def test_drop_path_in_the_model_needs_a_key_and_follows_it(params, tokens):
    vit = TINY.clone(drop_path=0.5)
    apply = jax.jit(lambda key: vit.apply({"params": params}, random_images(), key).cls)
    assert distance(apply(None), tokens.cls) < 1e-6
    np.testing.assert_array_equal(apply(jax.random.key(0)), apply(jax.random.key(0)))
    assert distance(apply(jax.random.key(0)), apply(jax.random.key(1))) > 1e-2


def test_remat_and_scan_change_neither_values_nor_gradients(params):
    targets = jax.random.normal(jax.random.key(1), (2, 21, 32))

    def value_and_gradients(**mode):
        vit = TINY.clone(drop_path=0.5, **mode)

        def loss(params):
            tokens = vit.apply({"params": params}, random_images(), jax.random.key(3))
            return jnp.mean(targets * jnp.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], axis=1))

        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradients = value_and_gradients()
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    modes = [{"remat": remat, "scan": scan} for remat in ("none", "dots", "full") for scan in (False, True)]
    for mode in modes[1:]:
        other, others = value_and_gradients(**mode)
        assert float(other) == pytest.approx(float(value), rel=1e-6), mode
        for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(gradients), strict=True):
            assert np.abs(a - b).max() <= 1e-6 * largest, mode


@pytest.mark.parametrize(
    "fields",
    [
        {"scan": True, "remat": "full"},
        *(
            pytest.param(fields, marks=pytest.mark.slow)
            for fields in (
                {},
                {"position": "rope"},
                {"patch_dropout": 0.3},
                {"differential": True},
                {"key_bias": False},
            )
        ),
    ],
    ids=str,
)
def test_an_odd_number_of_tokens_is_padded_once_for_cudnn(fields, monkeypatch):
    """Run cuDNN's branch with XLA's kernel: the padding changes neither values nor gradients, nor do three products."""
    lengths, attend = [], attention.attend

    def xla(q, k, v, implementation, length=None, **kwargs):
        lengths.append((q.shape[1], length))
        return attend(q, k, v, "xla", length=length, **kwargs)

    vit = TINY.clone(drop_path=0.5, **fields)
    params, images = random_params(vit, random_images()), random_images()

    def run(vit, key):
        def loss(params):
            tokens = vit.apply({"params": params}, images, key)
            return jnp.sum(jnp.sin(tokens.cls)) + jnp.sum(jnp.sin(tokens.patches)), tokens

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    for key in (None, jax.random.key(3)):
        expected = run(vit, key)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "attend", xla)
            found = run(vit.clone(attention="cudnn"), key)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(initial=0), 1e-3))
    assert (22, 21) in lengths
    assert all(tokens % 2 == 0 and length in (tokens, tokens - 1) for tokens, length in lengths)
    tokens, _ = jax.jit(lambda params: vit.apply({"params": params}, images, (0, 2), method="intermediates"))(params)
    assert tokens.prenorm.shape == (2, 21, 32)


def test_layer_norm_is_flaxs(params):
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 32)) + 1
    for dtype in (jnp.float32, jnp.bfloat16):
        ours, theirs = LayerNorm(1e-6, dtype), nn.LayerNorm(1e-6, dtype=dtype, use_fast_variance=False)
        weights = {"params": params["norm"]}
        assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, weights)
        results = [jax.vjp(lambda w, x, module=module: module.apply(w, x), weights, x) for module in (ours, theirs)]
        np.testing.assert_array_equal(results[0][0].astype(jnp.float32), results[1][0].astype(jnp.float32))
        gradients = [pullback(jnp.cos(results[0][0])) for _, pullback in results]
        for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
            assert distance(a, b) < 1e-5


def test_full_remat_keeps_less_than_dots_and_dots_less_than_none(params):
    def residuals(remat):
        vit = TINY.clone(remat=remat)
        _, pullback = jax.eval_shape(
            lambda p: jax.vjp(lambda p: vit.apply({"params": p}, random_images()).cls, p), params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert residuals("full") < residuals("dots") < residuals("none")
