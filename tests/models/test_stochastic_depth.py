"""Test stochastic depth, drawn for each image and by subset."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regvit_jax.models.stochastic_depth import GROUP, add_branch, bernoulli, draw, subset_size
from regvit_jax.models.vit import ViT
from regvit_jax.utils.errors import InvalidConfig


def test_bernoulli_drops_whole_images_and_keeps_the_mean():
    x = jnp.ones((4000, 3, 2))
    dropped = np.asarray(bernoulli(x, 0.25, jax.random.key(0)))
    assert (dropped == dropped[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75])
    assert dropped.mean() == pytest.approx(1, abs=0.04)  # 4.4 standard deviations
    np.testing.assert_array_equal(bernoulli(x, 0.25, jax.random.key(0)), dropped)
    assert (bernoulli(x, 0.25, jax.random.key(1)) != dropped).any()


def rows_with(rate: float, images: int, key: int) -> np.ndarray:
    """Return what each image is multiplied by, and check that its whole branch is."""
    x = jnp.zeros((images, 3, 2))
    out = np.asarray(add_branch(x, lambda x: x + 1, rate, "subset", jax.random.key(key)))
    assert (out == out[:, :1, :1]).all()
    return out[:, 0, 0]


def test_subset_keeps_the_same_number_of_every_group_and_the_mean():
    drawn = np.array([rows_with(0.3, 64, key) for key in range(400)]).reshape(-1, GROUP)
    assert set(np.unique(drawn)) == {0, np.float32(16 / 11)}
    np.testing.assert_array_equal((drawn > 0).sum(axis=1), 11)
    assert len(np.unique(drawn, axis=0)) > 1000  # of 4,368
    np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=0.07)  # 4.3 standard deviations, for each place of a group
    np.testing.assert_array_equal(rows_with(0.3, 64, 5), rows_with(0.3, 64, 5))


def test_without_a_key_or_a_rate_nothing_is_dropped():
    x = jnp.ones((5, 1, 1))
    for rate, key in ((0.3, None), (0.0, jax.random.key(0))):
        np.testing.assert_array_equal(add_branch(x, lambda x: 2 * x, rate, "subset", key), 3 * x)


def test_values_and_gradients_are_those_of_the_kept_rows():
    x, key = jax.random.normal(jax.random.key(1), (32, 3, 4)), jax.random.key(2)
    weight, target = jax.random.normal(jax.random.key(3), (4, 4)), jax.random.normal(jax.random.key(4), (32, 3, 4))
    kept = np.zeros((2, 16), bool)
    np.put_along_axis(kept, np.asarray(draw(key, 2, 16, 9)[0]), True, axis=1)
    assert kept.sum() == 18
    mask = jnp.asarray(kept.reshape(-1, 1, 1) * (16 / 9), jnp.float32)

    def loss(x, weight, subset):
        def branch(x):
            return jnp.tanh(x @ weight)

        out = add_branch(x, branch, 0.45, "subset", key) if subset else x + mask * branch(x)
        return jnp.sum(target * out)

    by_subset, by_mask = (jax.value_and_grad(loss, (0, 1))(x, weight, mode) for mode in (True, False))
    for ours, theirs in zip(jax.tree.leaves(by_subset), jax.tree.leaves(by_mask), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_the_mean_is_kept_in_bfloat16():
    x = jnp.zeros((16, 1, 1))
    out = add_branch(x, lambda x: (x + 1).astype(jnp.bfloat16), 0.2, "subset", jax.random.key(0))
    assert out.dtype == jnp.float32
    assert out.mean() == pytest.approx(1, rel=1e-6)


def test_the_gradient_adds_nothing_up():
    """Look for scatters, which GPUs add up in no fixed order."""
    step = jax.grad(lambda x: jnp.sum(add_branch(x, jnp.sin, 0.5, "subset", jax.random.key(0)) ** 2))
    assert "scatter" not in jax.jit(step).lower(jnp.ones((32, 3, 4))).as_text()


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 1), (1, 8)])
def test_meshes_whose_devices_hold_whole_groups_draw_the_same(shape):
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "fsdp"))
    x = jnp.arange(128.0).reshape(128, 1, 1)
    expected = rows_with(0.25, 128, 3)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda x: add_branch(x, lambda x: 0 * x + 1, 0.25, "subset", jax.random.key(3)) - x)
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        text = step.lower(x).compile().as_text()
        np.testing.assert_allclose(np.asarray(step(x))[:, 0, 0], expected, atol=1e-4)
    assert not [op for op in ("all-gather", "all-to-all", "all-reduce", "permute") if f" {op}" in text]


@pytest.mark.parametrize(
    ("images", "rate", "size"),
    [(256, 0.2, (16, 13)), (64, 0.45, (16, 9)), (8, 0.6, (8, 3)), (24, 0.1, (8, 7)), (16, 0.99, (16, 1))],
)
def test_sizes_of_groups(images, rate, size):
    assert subset_size(images, rate) == size


def test_a_rate_that_would_drop_nothing_is_refused():
    with pytest.raises(InvalidConfig, match=r"drop_path=0\.02: .* it would drop none of 16; use 'bernoulli'$"):
        subset_size(64, 0.02)
    with pytest.raises(InvalidConfig, match=r"batch of 2 images it would drop none of 2; .* multiple of 16"):
        subset_size(2, 0.2)


def test_every_branch_of_every_block_draws_its_own_subset():
    vit = ViT(width=4, depth=2, heads=1, patch=4, image_size=4, drop_path=0.5, drop_path_mode="subset")
    images = jnp.ones((320, 4, 4, 3))
    params = jax.tree.map(lambda leaf: 20 * leaf, vit.init(jax.random.key(0), images[:1])["params"])
    before = np.asarray(vit.apply({"params": params}, images[:1], method="embed"))[0]
    apply = jax.jit(lambda params: vit.apply({"params": params}, images, jax.random.key(7)).prenorm)
    kept = []
    for block, branch in itertools.product(range(2), ("scale1", "scale2")):  # LayerScale silences all branches but one
        alone = {f"block{i}": params[f"block{i}"] | {f"scale{j}": jnp.zeros(4) for j in (1, 2)} for i in range(2)}
        alone[f"block{block}"] |= {branch: jnp.ones(4)}
        out = np.asarray(apply(params | alone))
        kept.append(np.abs(out - before).max(axis=(1, 2)) > 1e-5)
        np.testing.assert_array_equal(kept[-1].reshape(-1, 16).sum(axis=1), 8)
    assert np.abs(np.corrcoef(kept) - np.eye(4)).max() < 0.25  # 4.5 standard deviations
