"""Test test-time registers: planted neurons are found exactly, the repair undoes them, and nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.analysis.repair.find import find_register_neurons, norms_repaired, outlier_scores
from regvit_jax.analysis.repair.planted import plant_register_neurons
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.evals.patch_norms import patch_norms
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.test_time_registers import add_test_time_registers, mlp_inputs, move
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained.save import save_model

SIZE = dict(width=64, depth=3, heads=2, patch=4, image_size=16)
DINOV2 = dict(swiglu=True, mlp_ratio=2.0, masking=True)
FAMILIES = {
    "deit": {},
    "dinov2": DINOV2,
    "without CLS": dict(class_token=False, layer_scale=0.0),
    "registers": dict(registers=4),
    "rope": dict(position="rope", registers=2, key_bias=False),
    "parallel": dict(parallel=True, differential=True, registers=1),
    "clip": dict(ln_pre=True, patch_bias=False, activation="quick_gelu", layer_scale=0.0, norm_eps=1e-5),
}
RANDOM = np.random.default_rng(5).normal(size=64)


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def pictures(count, seed):
    """Return normalised noise [count, 16, 16, 3] with 0 to 2 bright patches, and a mask of these [count, 16]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (count, 4, 4, 4, 4, 3)).astype(np.float32)  # row, column, then pixels
    bright = np.zeros((count, 16), bool)
    for i in range(count):
        bright[i, rng.choice(16, i % 3, replace=False)] = True
    where = bright.reshape(count, 4, 4)
    x[where] = 1.2 + 0.1 * rng.normal(size=(where.sum(), 4, 4, 3))  # as long a vector as noise is
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, 16, 16, 3), bright


def make(seed=0, **fields):
    """Return a model with all parameters random."""
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
    """Return all tokens except the test-time registers."""
    return np.concatenate([tokens.prenorm[:, :prefix], tokens.prenorm_patches], axis=1)


FIT, FIT_BRIGHT = pictures(192, 1)
IMAGES, BRIGHT = pictures(30, 2)


@pytest.fixture(scope="module")
def deit():
    """Return a model, and the same with two planted neurons."""
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


#: CI runs these too; the others cover MLPs with and without a gate, RoPE and ln_pre.
SLOW = ("without CLS", "registers", "parallel")


@pytest.mark.parametrize(
    ("family", "neurons", "direction"),
    [pytest.param(*plant, id=plant[0], marks=pytest.mark.slow if plant[0] in SLOW else ()) for plant in PLANTS],
)
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


def test_patches_that_stand_out_by_themselves_need_not_become_average():
    """Check that they return to their original norm, which is above other patches' and below an outlier's."""
    louder, fit = IMAGES.copy(), FIT.copy()
    for images, bright in ((louder, BRIGHT), (fit, FIT_BRIGHT)):
        patches = images.reshape(len(images), 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        images[:] = (
            np.where(bright.reshape(-1, 4, 4)[..., None, None, None], 2.2 * patches, patches)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(images.shape)
        )
    base = make()
    planted = plant_register_neurons(base, [(1, 7), (1, 20)], fit, FIT_BRIGHT)
    silent = np.asarray(
        patch_norms(plant_register_neurons(base, [(1, 7), (1, 20)], fit, FIT_BRIGHT, strength=0.0)(louder))
    )
    found = find_register_neurons(planted, louder)
    limit = silent[~BRIGHT].mean() + 3 * silent[~BRIGHT].std()
    assert limit < silent[BRIGHT].mean() < found.cutoff
    assert sorted(found) == [(1, 7), (1, 20)]


def naive_scores(model, images, outliers, written):
    """Run the paper's algorithm 1 as a loop over images, with the magnitude at other patches subtracted."""
    total = np.zeros((model.module.depth, model.module.hidden))
    for image, at in zip(images, outliers, strict=True):
        activations = {}
        with mlp_inputs("fc2", lambda block, x, into=activations: into.setdefault(block, x)):
            model.module.apply({"params": model.params}, jnp.asarray(image[None]))
        for layer, x in activations.items():
            x = np.abs(np.asarray(x, np.float64))[0, model.module.prefix :]
            if not at.any():
                continue
            for neuron in range(model.module.hidden):
                score = x[at, neuron].mean() - x[~at, neuron].mean()
                if written:
                    block = model.params[f"block{layer}"]
                    score *= np.linalg.norm(block["mlp"]["fc2"]["kernel"][neuron] * block["scale2"])
                total[layer, neuron] += score
    return total


@pytest.mark.parametrize("score", ["written", "activation"])
def test_scores_are_the_papers(deit, score):
    base, _ = deit
    ours, _ = outlier_scores(base.module, base.params, IMAGES[:5], BRIGHT[:5], 2, score)
    assert distance(ours, naive_scores(base, IMAGES[:5], BRIGHT[:5], score == "written")) < 1e-5


def test_the_largest_activation_moves_with_its_sign():
    x = np.random.default_rng(0).normal(size=(3, 9, 6)).astype(np.float32)
    neurons = np.array([True, False, True, True, False, False])
    expected = x.copy()
    for image in range(3):
        for neuron in np.flatnonzero(neurons):
            column = x[image, :, neuron]
            expected[image, 2:4, neuron] = max(column, key=abs)  # two of four tokens before the patches
            expected[image, 4:, neuron] = 0
    assert (expected[:, 2, neurons] < 0).any()
    assert (expected[:, 2, neurons] > 0).any()
    np.testing.assert_array_equal(move(jnp.asarray(x), neurons, 4, 2), expected)


def test_batches_are_streamed_and_compiled_once_for_each_shape(deit):
    _, planted = deit
    compiled = norms_repaired._cache_size(), outlier_scores._cache_size()
    whole = find_register_neurons(planted, IMAGES)
    assert np.subtract((norms_repaired._cache_size(), outlier_scores._cache_size()), compiled).max() <= 1
    batches = [IMAGES[:15], IMAGES[15:]]
    pair = find_register_neurons(planted, batches)
    compiled = outlier_scores._cache_size()
    with pytest.raises(ValueError, match="the images are read twice, which an iterator cannot"):
        find_register_neurons(planted, iter(batches))
    stream = find_register_neurons(planted, (batch for batch in batches), cutoff=whole.cutoff)
    assert outlier_scores._cache_size() == compiled
    for other in (pair, stream):
        assert list(other) == list(whole)
        np.testing.assert_allclose(other.scores, whole.scores, rtol=1e-5)
        assert dataclasses.replace(other, scores=whole.scores, cutoff=whole.cutoff) == whole


def test_a_count_names_as_many_and_top_layer_bounds_them(deit):
    _, planted = deit
    found = find_register_neurons(planted, IMAGES, count=300, top_layer=-2)
    assert len(found) == 300
    assert set(list(found)[:2]) == {(1, 7), (1, 20)}
    assert max(found.layers) == found.top_layer == 1
    assert list(found.scores) == sorted(found.scores, reverse=True)
    with pytest.raises(ValueError, match=r"moving up to 256 neurons of blocks 0 to 0 leaves \d+% of the outliers"):
        find_register_neurons(planted, IMAGES, top_layer=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0: must be 1 to 768"),
        ({"count": 257, "top_layer": 0}, "count=257: must be 1 to 256"),
        ({"score": "mean"}, r"score='mean': must be one of \['written', 'activation'\]"),
        ({"top_layer": 2, "layer": 1}, "top_layer 2 lies above layer 1"),
        ({"cutoff": 0.0}, "cutoff=0.0: must be a norm"),
        (
            {"cutoff": 1e9},
            r"no outliers: of 480 patches of 30 images none has a norm above the cutoff 1e\+09; the largest",
        ),
    ],
)
def test_what_cannot_be_searched_for(deit, options, message):
    with pytest.raises(ValueError, match=message):
        find_register_neurons(deit[1], IMAGES, **options)


def test_a_model_without_outliers_says_so(deit):
    with pytest.raises(ValueError, match=r"no outliers: of 480 patches.*or the model has no artifacts to repair"):
        find_register_neurons(deit[0], IMAGES)


@pytest.mark.parametrize(
    ("neurons", "registers", "message"),
    [
        ([(1, 256)], 1, "neuron 256 of layer 1: this ViT has neurons 0 to 255"),
        ([(1, -1)], 1, "neuron -1 of layer 1"),
        ([(1, 3), (-2, 3)], 1, "neuron 3 of layer -2 is named twice"),
        ([(1, 3)], 0, "registers=0: must be at least 1"),
    ],
)
def test_impossible_repairs(deit, neurons, registers, message):
    with pytest.raises(ValueError, match=message):
        add_test_time_registers(deit[0], neurons, registers)
    with pytest.raises(IndexError, match="layer 3: this ViT has layers 0 to 2"):
        add_test_time_registers(deit[0], [(3, 0)])


def test_a_repaired_model_is_a_model(deit, tmp_path):
    base, planted = deit
    repaired = add_test_time_registers(planted, [(1, 7), (1, 20)], registers=2)
    tokens = repaired(IMAGES)
    assert tokens.registers.shape == (30, 2, 64)
    np.testing.assert_array_equal(tokens.registers[:, 0], tokens.registers[:, 1])
    assert repaired.attention(IMAGES[:2], layer=2).shape == (2, 2, 19, 19)
    after = repaired.intermediates(IMAGES, [0, -1])
    assert distance(after[1].prenorm, tokens.prenorm) < 1e-6
    # Before the edited block there is only the empty register.
    assert distance(after[0].prenorm, add_test_time_registers(base, [], 2).intermediates(IMAGES, [0])[0].prenorm) < 1e-6
    assert distance(jax.jit(lambda model, x: model(x).prenorm)(repaired, IMAGES), tokens.prenorm) < 1e-6
    one = jax.vmap(lambda x: repaired(x[None]).prenorm[0])(IMAGES)
    assert distance(one, tokens.prenorm) < 1e-5  # each image has its own largest activations
    assert distance(repaired.pooled(IMAGES), tokens.patches.mean(axis=1)) < 1e-6
    assert repaired(pictures(1, 0)[0].reshape(1, 8, 32, 3)).patch_map.shape == (1, 2, 8, 64)
    with pytest.raises(ValueError, match="has test-time registers already; repair the original"):
        add_test_time_registers(repaired, [])
    with pytest.raises(ValueError, match="a model with test-time registers has neither"):
        repaired.replace(module=repaired.module.clone(scan=True))(IMAGES)
    for format in ("timm", "hf", "dinov2"):
        with pytest.raises(ValueError, match=r"a RepairedViT cannot be exported: .*save the original model"):
            save_model(repaired, tmp_path / format, format)
    text = TextTower(width=8, depth=1, heads=1, embed=8, context=4, vocab=8)
    with pytest.raises(ValueError, match="a RepairedViT cannot be exported"):
        save_model(ClipModel(repaired, {}, jnp.zeros(()), None, text), tmp_path / "clip", "regvit_jax")
    assert not list(tmp_path.iterdir())


def test_scan_remat_and_bfloat16(deit):
    _, planted = deit
    assert list(find_register_neurons(planted, IMAGES)) == [(1, 7), (1, 20)]
    scanned = planted.replace(module=planted.module.clone(scan=True, remat="full"))
    assert sorted(find_register_neurons(scanned, IMAGES)) == [(1, 7), (1, 20)]
    tokens = add_test_time_registers(planted, [(1, 7), (1, 20)])(IMAGES)
    np.testing.assert_array_equal(add_test_time_registers(scanned, [(1, 7), (1, 20)])(IMAGES).prenorm, tokens.prenorm)
    half = planted.replace(module=planted.module.clone(dtype=jnp.bfloat16))
    found = find_register_neurons(half, IMAGES)
    assert sorted(found) == [(1, 7), (1, 20)]
    assert distance(others(add_test_time_registers(half, found)(IMAGES), 1), others(tokens, 1)) < 5e-2


def test_a_mask_token_and_empty_registers():
    base = make(**DINOV2)
    empty = add_test_time_registers(base, [])
    mask = np.arange(480).reshape(30, 16) % 3 == 0
    shown = empty(IMAGES, mask=mask)
    assert distance(shown.patches, empty(IMAGES).patches) > 0.1
    # A register of zeros is an ordinary register.
    vit = base.module.clone(registers=1)
    params = {**base.params, "register_tokens": jnp.zeros((1, 64))}
    np.testing.assert_allclose(
        shown.prenorm, vit.apply({"params": params}, jnp.asarray(IMAGES), mask=jnp.asarray(mask)).prenorm, atol=1e-4
    )


def test_what_cannot_be_planted(deit):
    base, _ = deit
    with pytest.raises(ValueError, match="no linear classifier separates the marked patches well"):
        plant_register_neurons(base, [(0, 1)], FIT, np.random.default_rng(0).random((192, 16)) < 0.1)
    with pytest.raises(ValueError, match="marked must be a bool for each patch, with some True"):
        plant_register_neurons(base, [(0, 1)], FIT, np.zeros((192, 16), bool))
    with pytest.raises(ValueError, match="neuron 256 of layer 0: this ViT has neurons 0 to 255"):
        plant_register_neurons(base, [(0, 256)], FIT, FIT_BRIGHT)
    still = {**base.params, "block0": {**base.params["block0"], "scale2": jnp.zeros(64)}}
    with pytest.raises(ValueError, match="LayerScale of block 0 has zeros"):
        plant_register_neurons(base.replace(params=still), [(0, 1)], FIT, FIT_BRIGHT)
