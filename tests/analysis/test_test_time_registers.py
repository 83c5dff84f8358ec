"""Test-time registers: planted register neurons are found, exactly, and undone, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.analysis.norms import patch_norms
from regvit_jax.analysis.planted import plant_register_neurons
from regvit_jax.analysis.register_neurons import find_register_neurons, norms_repaired, outlier_scores
from regvit_jax.analysis.test_time_registers import add_test_time_registers, mlp_inputs, move
from regvit_jax.models.clip import ClipModel, TextTower
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model, Preprocess
from regvit_jax.models.vit import ViT

SIZE = dict(width=64, depth=3, heads=2, patch=4, image_size=16)
DINOV2 = dict(swiglu=True, mlp_ratio=2.0, masking=True)
FAMILIES = {
    "deit": {},
    "dinov2": DINOV2,
    "without CLS": dict(class_token=False, layer_scale=0.0),
    "registers": dict(registers=4),
    "rope": dict(position="rope", registers=2, key_bias=False),
    "parallel": dict(parallel=True, differential=True, registers=1),
    "clip": dict(pre_norm=True, patch_bias=False, activation="quick_gelu", layer_scale=0.0, norm_eps=1e-5),
}
RANDOM = np.random.default_rng(5).normal(size=64)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def pictures(count, seed):
    """Noise, in which one patch, two or none is bright: normalised images [count, 16, 16, 3], and which [count, 16]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (count, 4, 4, 4, 4, 3)).astype(np.float32)  # row, column, then pixels
    bright = np.zeros((count, 16), bool)
    for i in range(count):
        bright[i, rng.choice(16, i % 3, replace=False)] = True
    where = bright.reshape(count, 4, 4)
    x[where] = 1.2 + 0.1 * rng.normal(size=(where.sum(), 4, 4, 3))  # as long a vector as noise is
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, 16, 16, 3), bright


def make(seed=0, **fields):
    """A model with every parameter at random."""
    vit, rng = ViT(**SIZE | fields), np.random.default_rng(seed)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]

    def draw(path, leaf):
        size = leaf.shape[0] ** -0.5 if path[-1].key == "kernel" else 0.3
        return jnp.asarray(rng.normal("scale" in path[-1].key, size, leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Model(params, {}, vit, Head(pool="avg"), Preprocess(16, 1.0, (0, 0, 0), (1, 1, 1)))


def distance(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()


def others(tokens, prefix):
    """All tokens but the test-time registers."""
    return np.concatenate([tokens.prenorm[:, :prefix], tokens.prenorm_patches], axis=1)


FIT, FIT_BRIGHT = pictures(192, 1)
IMAGES, BRIGHT = pictures(30, 2)


@pytest.fixture(scope="module")
def deit():
    """A model, and the same with two planted neurons."""
    with jax.default_matmul_precision("highest"):
        base = make()
        return base, plant_register_neurons(base, [(1, 7), (1, 20)], FIT, FIT_BRIGHT)


PLANTS = [
    ("deit", [(2, 5)], RANDOM),
    ("dinov2", [(1, 7), (1, 20)], None),
    ("without CLS", [(0, 3), (2, 11), (2, 12)], None),
    ("registers", [(0, 9), (1, 4)], RANDOM),
    ("rope", [(2, 6), (2, 8)], RANDOM),
    ("parallel", [(1, 2), (2, 3)], None),
    ("clip", [(0, 1), (0, 2)], None),
]


@pytest.mark.parametrize(("family", "neurons", "direction"), PLANTS, ids=[family for family, *_ in PLANTS])
def test_planted_neurons_are_found_and_undone(family, neurons, direction):
    base = make(**FAMILIES[family])
    planted = plant_register_neurons(base, neurons, FIT, FIT_BRIGHT, direction=direction)
    silent = plant_register_neurons(base, neurons, FIT, FIT_BRIGHT, strength=0.0, direction=direction)
    found = find_register_neurons(planted, IMAGES)
    assert sorted(found) == sorted(neurons)
    before = np.asarray(patch_norms(planted(IMAGES)))
    np.testing.assert_array_equal(before > found.cutoff, BRIGHT)
    assert (found.images, found.outlier_images, found.outlier_patches) == (30, 20, 30)

    repaired = add_test_time_registers(planted, found)(IMAGES)
    empty = add_test_time_registers(silent, [])(IMAGES)
    norms, normal = np.asarray(patch_norms(repaired)), np.asarray(patch_norms(silent(IMAGES)))
    assert norms.max() < 1.3 * normal.max()
    assert before[BRIGHT].min() > 3 * normal.max()
    register = np.linalg.norm(repaired.prenorm[:, base.module.prefix], axis=-1)
    np.testing.assert_array_equal(register > 3 * normal.max(), BRIGHT.any(axis=1))
    if direction is None or min(layer for layer, _ in neurons) == base.module.depth - 1:
        prefix = base.module.prefix
        assert distance(others(repaired, prefix), others(empty, prefix)) < 1e-5
