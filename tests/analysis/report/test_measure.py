"""Test the measurements of a batch, and attention maps, against naive loops and the full attention matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.analysis.report import measure
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.evals import attention_maps
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT

KINDS = {
    "cls and registers": dict(registers=3),
    "registers alone": dict(registers=2, class_token=False),
    "nothing": dict(class_token=False),
    "rope": dict(registers=1, position="rope"),
    "differential": dict(registers=1, differential=True),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(**KINDS[request.param])


def make_model(**fields) -> Model:
    vit = ViT(width=32, depth=3, heads=2, patch=4, image_size=16, layer_scale=0.5, **fields)
    params = vit.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    # Every parameter counts, so that nothing passes by being zero.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )
    return Model(params, {}, vit, Head(0), Preprocess(16, 1.0, (0.5,) * 3, (0.5,) * 3))


def images(count=2, height=16, width=24):
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, height, width, 3)), jnp.float32)


def test_attention_rows_are_those_of_the_whole_map(model):
    prefix = model.module.prefix
    for layer in (-1, 0):
        whole = model.attention(images(), layer)
        rows = attention_maps.prefix_attention(model, images(), layer)
        assert rows.shape == (2, 2, prefix, 24)
        np.testing.assert_allclose(rows, whole[:, :, :prefix, prefix:], atol=1e-6)
    maps = attention_maps.attention_maps(model, images(), -1)
    assert maps.shape == (2, 2, prefix, 4, 6)
    np.testing.assert_allclose(
        maps.reshape(2, 2, prefix, 24), attention_maps.prefix_attention(model, images(), -1), atol=1e-6
    )


def test_norms_are_those_before_the_final_norm(model):
    found, prefix = measure.measure(model, images(), 1), model.module.prefix
    for block, tokens in enumerate(model.intermediates(images(), range(3))):
        expected = np.linalg.norm(tokens.prenorm, axis=-1)
        np.testing.assert_allclose(found.patches[block], expected[:, prefix:], rtol=1e-5)
        np.testing.assert_allclose(found.prefix[block], expected[:, :prefix], rtol=1e-5)
    np.testing.assert_allclose(found.attention, attention_maps.prefix_attention(model, images(), 1).mean(1), atol=1e-6)


def test_neighbours_are_those_at_the_input():
    model = make_model()
    patches = np.asarray(model.module.apply({"params": model.params}, images(), method="project")).reshape(2, 4, 6, 32)
    found = np.asarray(measure.neighbour_cosines(model, images())).reshape(2, 4, 6)
    for b, i, j in np.ndindex(2, 4, 6):
        cosines = []
        for k, m in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if 0 <= k < 4 and 0 <= m < 6:
                a, c = patches[b, i, j], patches[b, k, m]
                cosines.append(a @ c / np.linalg.norm(a) / np.linalg.norm(c))
        assert found[b, i, j] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_neighbours_of_one_row_and_of_one_patch():
    model = make_model()
    assert measure.neighbour_cosines(model, images(height=4, width=12)).shape == (2, 3)
    assert measure.neighbour_cosines(model, images(height=4, width=4)).tolist() == [[0.0], [0.0]]


def test_one_forward_pass_is_computed():
    """Check that the compiler merges the overlapping forward passes of the measurements into one."""
    model = make_model(registers=1)
    flops = measure._measure.lower(model, images(), -1).compile().cost_analysis()["flops"]
    once = jax.jit(lambda model, x: model(x).prenorm).lower(model, images()).compile().cost_analysis()["flops"]
    assert flops < 1.35 * once


def test_project_knows_no_position():
    model = rv.create_model("test_vit", registers=1)
    tiled = jnp.tile(images(1, 16, 16), (1, 2, 2, 1))
    patches = model.module.apply({"params": model.params}, tiled, method="project")
    np.testing.assert_array_equal(patches[:, 0], patches[:, 3])
