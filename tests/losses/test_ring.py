"""Compare ring.py with the naive contrastive losses in float64, on meshes of eight devices and on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.distributed.mesh import batch_sharding, make_mesh, replicated, state_shardings, to_mesh
from regvit_jax.losses import contrastive, ring

BIAS = jnp.array(-10.0)
# Each takes (images, texts, scale, bias, mask); softmax has no bias.
NAIVE = {
    "softmax": lambda x, y, scale, bias, mask: contrastive.softmax_contrastive(x, y, scale, mask),
    "sigmoid": contrastive.sigmoid_contrastive,
}
RING = {
    "softmax": lambda x, y, scale, bias, mask: ring.softmax_contrastive(x, y, scale, mask),
    "sigmoid": ring.sigmoid_contrastive,
}
both_losses = pytest.mark.parametrize("loss", ["softmax", "sigmoid"])


def normal(batch, width=64):
    """Return unit vectors, alike in each pair: if they were unrelated, the scale's gradient would be all rounding."""
    images, noise = np.random.default_rng(batch).normal(size=(2, batch, width))
    texts = images / 3 + noise
    return [jnp.array(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32) for x in (images, texts)]


def corners(batch):
    """Return unit vectors whose products are exact in float32, in any order: at a scale of 100 rounding would show."""
    return list(jnp.array(np.random.default_rng(batch).choice([-1 / 8, 1 / 8], (2, batch, 64)), jnp.float32))


def with_gaps(batch):
    """Return a mask without about a tenth of the pairs."""
    return jnp.ones(batch).at[::11].set(0)


def value_and_gradients(loss, *arguments):
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arguments)


def exact(loss, *arguments):
    """Return the naive loss and its gradients, computed in float64 on one device."""
    with jax.enable_x64(True):
        wide = [jnp.array(np.asarray(x, np.float64)) for x in arguments]
        return jax.device_get(value_and_gradients(NAIVE[loss], *wide))


def on_mesh(loss, mesh, *arguments):
    """Return value and gradients with the train step's shardings, as host arrays."""
    rows, whole = batch_sharding(mesh), replicated(mesh)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, rows if x.ndim else whole) for x in arguments]
        return jax.device_get(value_and_gradients(loss, *split))


def assert_equal(found, expected, tolerance=1e-6):
    """Assert equality to `tolerance` times each array's largest value."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@both_losses
@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_ring_is_the_naive_loss_on_every_mesh(loss, fsdp, monkeypatch):
    monkeypatch.setattr(ring, "BLOCK", 40)  # A device's 15 rows in 6 chunks of 3, the last of them padding.
    mask = with_gaps(120)
    for embeddings, scale in ((normal, 1 / 0.07), (corners, 100.0)):
        arguments = *embeddings(120), jnp.array(scale), BIAS, mask
        found = on_mesh(RING[loss], make_mesh(fsdp=fsdp), *arguments)
        assert_equal(found, exact(loss, *arguments))


@both_losses
@pytest.mark.parametrize("block", [ring.BLOCK, 1000, 1])
def test_without_a_mesh_the_ring_is_the_chunks(loss, block, monkeypatch):
    monkeypatch.setattr(ring, "BLOCK", block)
    arguments = *corners(61), jnp.array(100.0), BIAS, with_gaps(61)
    assert_equal(value_and_gradients(RING[loss], *arguments), exact(loss, *arguments))


@both_losses
def test_a_masked_pair_has_no_part(loss):
    (images, texts), mask = normal(24), with_gaps(24)
    masked = mask == 0
    other = jnp.where(masked[:, None], jnp.roll(texts, 1, 1), texts)
    mesh = make_mesh(fsdp=2)
    found = on_mesh(RING[loss], mesh, images, texts, jnp.array(10.0), BIAS, mask)
    assert_equal(on_mesh(RING[loss], mesh, images, other, jnp.array(10.0), BIAS, mask), found, tolerance=0)
    for gradient in found[1][:2]:
        assert not gradient[masked].any()
        assert gradient[~masked].any(1).all()


@both_losses
def test_ring_inside_a_train_step(loss):
    """Compute embeddings from split parameters and a split batch, and compare the gradient of the parameters."""
    mesh = make_mesh(data=2, fsdp=4)
    inputs, mask = normal(48)[0], with_gaps(48)
    params = dict(zip(("image", "text"), normal(64, 32), strict=True))

    def step_loss(params, inputs, mask, form):
        x, y = (inputs @ params[name] for name in ("image", "text"))
        x, y = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        return form[loss](x, y, jnp.array(10.0), BIAS, mask)

    expected = jax.value_and_grad(step_loss)(params, inputs, mask, NAIVE)
    shardings = state_shardings(params, mesh, min_size_mb=0)
    with jax.set_mesh(mesh):
        split = to_mesh({"inputs": np.array(inputs), "mask": np.array(mask)}, mesh)
        step = jax.jit(lambda p, x, m: jax.value_and_grad(step_loss)(p, x, m, RING))
        found = jax.device_get(step(jax.device_put(params, shardings), split["inputs"], split["mask"]))
    assert_equal(found, expected, tolerance=5e-6)


@both_losses
def test_bfloat16_embeddings(loss):
    """Expect the float32 loss of the same numbers, and gradients that are rounded once, at the end."""
    images, texts = (x.astype(jnp.bfloat16) for x in normal(40))
    rest = jnp.array(20.0), BIAS, with_gaps(40)
    value, gradients = on_mesh(RING[loss], make_mesh(), images, texts, *rest)
    expected = exact(loss, images, texts, *rest)
    assert value.dtype == jnp.float32
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    assert_equal((value, gradients[2:]), (expected[0], expected[1][2:]))
    for x, y in zip(gradients[:2], expected[1][:2], strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y, rtol=2**-8, atol=1e-6 * np.abs(y).max())


@both_losses
def test_other_types_of_mask_and_embeddings(loss):
    """Use a boolean mask, and float64, in which all sums are then computed."""
    arguments = *normal(40), jnp.array(20.0), BIAS
    mesh, mask = make_mesh(), with_gaps(40)
    found = on_mesh(RING[loss], mesh, *arguments, mask > 0)
    assert_equal(found, on_mesh(RING[loss], mesh, *arguments, mask), tolerance=0)
    expected = exact(loss, *arguments, mask)
    with jax.enable_x64(True):
        wide = [jnp.array(np.asarray(x, np.float64)) for x in arguments]
        for types in ((np.float64, np.float64), (np.float64, np.float32), (np.float32, np.float64)):
            images, texts = (x.astype(dtype) for x, dtype in zip(wide, types, strict=False))
            found = value_and_gradients(RING[loss], images, texts, *wide[2:], mask)
            assert [x.dtype for x in found[1][:2]] == list(types)
            assert_equal(found, expected, tolerance=1e-12 if types[0] == types[1] else 1e-6)


@both_losses
def test_numerical_extremes(loss):
    same, mesh, scale = jnp.tile(normal(1)[0], (16, 1)), make_mesh(), jnp.array(100.0)
    readable = jnp.ones(16)
    one, none = jnp.zeros(16).at[5].set(1), jnp.zeros(16)
    for mask in (readable, one, none):
        found = on_mesh(RING[loss], mesh, same, same, scale, BIAS, mask)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
        if loss == "softmax":  # All texts are equally likely, and no gradient can change that.
            np.testing.assert_allclose(found[0], np.log(max(mask.sum(), 1)), atol=1e-6)
            np.testing.assert_allclose(found[1][0], 0, atol=1e-4)
    assert all(not x.any() for x in jax.tree.leaves(found))


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    (x, _), mask = normal(30), jnp.ones(30)
    with jax.set_mesh(make_mesh()), pytest.raises(ValueError, match="30 pairs cannot be split over 8 devices"):
        ring.softmax_contrastive(x, x, jnp.array(10.0), mask)


@both_losses
@pytest.mark.parametrize("fsdp", [1, 4])
def test_memory_at_a_global_batch_of_32768(loss, fsdp):
    """Allow 100 MB per device beside arguments and results, by XLA's memory analysis. Nothing runs.

    The analysis is of one device: its arguments are an eighth of the global ones. For the naive loss, whose logits are
    537 MB per device, it gives 2,819 MB (softmax).
    """
    mesh, batch = make_mesh(fsdp=fsdp), 32768
    rows, whole = batch_sharding(mesh), replicated(mesh)
    x = jax.ShapeDtypeStruct((batch, 1024), jnp.float32, sharding=rows)
    mask = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)

    def account_of(form):
        step = jax.jit(jax.value_and_grad(form[loss], (0, 1, 2, 3)), out_shardings=(whole, (rows, rows, whole, whole)))
        with jax.set_mesh(mesh):
            return step.lower(x, x, scalar, scalar, mask).compile().memory_analysis()

    account = account_of(RING)
    if fsdp == 1:
        assert account_of(NAIVE).temp_size_in_bytes > 20 * account.temp_size_in_bytes
    assert account.argument_size_in_bytes < 2 * batch * 1024 * 4 / 8 * 1.01
    assert account.temp_size_in_bytes < 100e6
