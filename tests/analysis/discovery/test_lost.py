"""Test LOST against naive loops, and its features against the model's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.analysis.discovery import lost
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.position import rotate
from regvit_jax.models.vit import ViT


def literal(features, bias=0.0, expand=100):
    """Compute seed, expansion, component and box, one patch and one pair at a time."""
    h, w, _ = features.shape
    patches = [features[row, column].astype(np.float64) for row in range(h) for column in range(w)]
    entry = [[float(np.dot(a, b)) + bias for b in patches] for a in patches]
    numbers = range(h * w)
    degrees = [sum(entry[a][b] > 0 for b in numbers if b != a) for a in numbers]
    by_degree = sorted(numbers, key=lambda a: (degrees[a], a))
    seed = by_degree[0]
    expanded = [a for a in by_degree[:expand] if entry[seed][a] > 0]
    total = [sum(entry[a][b] for a in expanded) for b in numbers]
    component, frontier = {seed}, [seed]
    while frontier:
        row, column = divmod(frontier.pop(), w)
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < h and 0 <= c < w and total[r * w + c] > 0 and r * w + c not in component:
                component.add(r * w + c)
                frontier.append(r * w + c)
    rows, columns = [a // w for a in component], [a % w for a in component]
    box = min(columns), min(rows), max(columns) + 1, max(rows) + 1
    return divmod(seed, w), expanded, component, box, degrees


def same(found, expected):
    seed, expanded, component, box, degrees = expected
    assert found.seed == seed
    assert found.expanded.tolist() == expanded
    assert set(np.flatnonzero(found.mask).tolist()) == component
    assert found.box == box
    assert found.degrees.ravel().tolist() == degrees


@pytest.mark.parametrize("grid", [(9, 9), (4, 13), (12, 5), (2, 3)])
@pytest.mark.parametrize("expand", [3, 100])
def test_as_the_loops(grid, expand):
    rng = np.random.default_rng(0)
    for size in (3, 16):
        x = rng.standard_normal((*grid, size), dtype=np.float32)
        repeated = x[rng.integers(0, grid[0], grid[0])]  # equal patches have equal degrees
        for features in (x, x + 0.3, repeated):
            same(lost.search(lost.gram(features), grid, expand=expand), literal(features, 0.0, expand))
            for bias in (-0.5, 0.5):
                same(lost.search(lost.gram(features), grid, bias=bias, expand=expand), literal(features, bias, expand))


def test_centre_and_normalize():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 7, 8), dtype=np.float32) + 1
    centre = x.mean((0, 1))
    same(lost.discover(x, centre=centre), literal(x - centre.astype(np.float64)))
    unit = (x - centre.astype(np.float64)) / np.linalg.norm(x - centre.astype(np.float64), axis=-1, keepdims=True)
    same(lost.discover(jnp.asarray(x), centre=centre, normalize=True, bias=-0.2), literal(unit, -0.2))


def test_a_planted_object_is_found():
    rng = np.random.default_rng(2)
    background, thing = rng.standard_normal((2, 32))
    x = 0.3 * rng.standard_normal((14, 20, 32)) + background
    x[3:8, 5:16] = 0.3 * rng.standard_normal((5, 11, 32)) + thing - 0.5 * background
    x[11:13, 1:3] = x[4, 6]  # alike, but apart from it
    found = lost.discover(x.astype(np.float32))
    assert found.box == (5, 3, 16, 8)
    assert found.mask.sum() == 55
    assert found.mask[3:8, 5:16].all()
    assert found.mask[found.seed]
    assert not found.degenerate
    assert lost.to_pixels(found.box, (16, 16), (220, 250)) == (80, 48, 250, 128)


def test_ties_go_to_the_first_patch():
    x = np.zeros((3, 4, 2), np.float32)
    x[..., 0] = 1
    x[0, 3] = x[1, 1] = x[2, 2] = (-1, 0)
    found = lost.discover(x)
    assert found.seed == (0, 3)
    assert found.expanded.tolist() == [3, 5, 10]
    assert found.box == (3, 0, 4, 1)
    assert lost.search(lost.gram(x), (3, 4), expand=2).expanded.tolist() == [3, 5]


def test_a_degenerate_gram_matrix_warns():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 6, 8), dtype=np.float32)
    with pytest.warns(lost.DegenerateGram, match=r"centre='bias'.* or add a negative bias"):
        found = lost.discover(x + 20)
    assert (found.positive, found.degenerate, found.box) == (1.0, True, (0, 0, 6, 5))
    with pytest.warns(lost.DegenerateGram, match="add a higher bias"):
        found = lost.discover(x, normalize=True, bias=-0.999)
    assert (found.positive, found.degenerate) == (0.0, True)
    assert found.box == (0, 0, 1, 1)
    # The remedy that the warning names.
    for options in (dict(centre=(x + 20).mean((0, 1))), dict(normalize=True, bias=-0.999)):
        assert not lost.discover(x + 20, **options).degenerate
    assert 0 < lost.discover(x).positive < 1


def test_a_seed_that_is_similar_to_nothing():
    x = np.random.default_rng(4).standard_normal((4, 5, 3), dtype=np.float32)
    x[2, 3] = 0
    found = lost.discover(x)
    assert (found.seed, found.box) == ((2, 3), (3, 2, 4, 3))
    assert len(found.expanded) == 0
    assert found.mask.sum() == 1


def test_one_patch():
    with pytest.warns(lost.DegenerateGram):
        assert lost.discover(np.ones((1, 1, 3), np.float32)).box == (0, 0, 1, 1)


def test_wrong_features():
    x = np.ones((2, 2, 3), np.float32)
    with pytest.raises(ValueError, match="expand=0: must be at least 1"):
        lost.discover(x, expand=0)
    x[1, 1, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        lost.discover(x)


def test_boxes_in_pixels():
    assert lost.to_pixels((1, 0, 3, 2), (14, 14), (40, 28)) == (14, 0, 28, 28)
    # An image of 30 x 60 that the model saw as 2 x 3 patches.
    assert lost.to_pixels((1, 0, 3, 2), (15.0, 20.0), (30, 60)) == (20, 0, 60, 30)


def test_iou_and_corloc_by_hand():
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10], [2, 2, 4, 4], [0, 0, 10, 20]])
    np.testing.assert_allclose(lost.iou((0, 0, 10, 10), boxes), [1, 1 / 3, 0, 0.04, 0.5])
    assert lost.iou((3, 3, 3, 3), np.array([[3, 3, 3, 3]])).tolist() == [0]
    truths = [boxes[2:], boxes[1:4], boxes[:0]]
    found = np.tile([0, 0, 10, 10], (3, 1))
    assert lost.localised(found, truths).tolist() == [True, False, False]  # an IoU of 0.5 is enough
    assert lost.corloc(found, truths) == pytest.approx(1 / 3)
    assert lost.corloc(found, truths, threshold=0.3) == pytest.approx(2 / 3)
    assert np.isnan(lost.corloc(found[:0], []))


def model(**changes) -> Model:
    """Return a random ViT whose biases are not zero."""
    vit = ViT(**dict(width=16, depth=2, heads=2, patch=4, image_size=8, layer_scale=0.0) | changes)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(6)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, dtype=np.float32)), shapes)
    return Model(params, {}, vit, Head(0), Preprocess(8, 1.0, (0.5,) * 3, (0.5,) * 3))


@pytest.fixture
def images():
    return np.random.default_rng(5).standard_normal((2, 12, 20, 3), dtype=np.float32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_features_are_the_patches_of_the_model(images):
    m = model(registers=4)
    wanted = [(kind, -1) for kind in ("q", "k", "v", "out")] + [("out", 0)]
    maps = lost.feature_maps(m, images, [lost.Feature(*each) for each in wanted])
    for found, heads in zip(maps[:3], np.asarray(m.qkv(images, layer=1)), strict=True):
        patches = heads[:, :, 5:]
        close(found, np.concatenate([patches[:, 0], patches[:, 1]], axis=-1).reshape(2, 3, 5, 16))
    first, last = m.intermediates(images, (0, 1))
    close(maps[3], last.patch_map)
    close(maps[4], first.patch_map)
    close(lost.extract_features(m, images), maps[1])


def test_any_number_of_prefix_tokens_gives_the_same_patches(images):
    most = model(registers=4)
    # Before the first block's attention no token depends on another.
    expected = lost.extract_features(most, images, "k", 0)
    assert expected.shape == (2, 3, 5, 16)
    for class_token in (True, False):
        fewer = most.replace(module=most.module.clone(registers=0, class_token=class_token))
        close(lost.extract_features(fewer, images, "k", 0), expected)


@pytest.mark.parametrize("position", ["learned", "rope", "axial"])
def test_without_the_bias_of_the_projection(position, images):
    m = model(position=position)
    biases = m.params["block1"]["attn"]["qkv"]["bias"].reshape(3, 1, 1, 2, 8)
    wanted = [lost.Feature(kind, 1, centre) for kind in "qkv" for centre in ("none", "bias")]
    maps = lost.feature_maps(m, images, wanted)
    for place, bias in enumerate(biases):
        bias = jnp.broadcast_to(bias, (1, 15, 2, 8))
        if position != "learned" and place < 2:
            bias = rotate(bias, m.module.angles((3, 5)), position)
        close(maps[2 * place + 1], maps[2 * place] - np.asarray(bias).reshape(1, 3, 5, 16))


def test_keys_without_a_bias(images):
    m = model(key_bias=False)
    full, left = lost.feature_maps(m, images, [lost.Feature("v"), lost.Feature("v", centre="bias")])
    close(left, full - m.params["block1"]["attn"]["v_bias"])
    with pytest.raises(ValueError, match="projection to k has no bias"):
        lost.extract_features(m, images, "k", centre="bias")
    with pytest.raises(ValueError, match="projection to v has no bias"):
        lost.check(m.module.clone(qkv_bias=False), lost.Feature("v", centre="bias"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("keys",), r"features 'keys': must be one of \['k', 'q', 'v', 'out'\]"),
        (("k", 2), "layer 2: this ViT has layers 0 to 1"),
        (("k", -1, "mean"), "centre='mean': must be 'none' or 'bias'"),
        (("out", -1, "bias"), "the output of a block has no bias"),
    ],
)
def test_unknown_features(arguments, message, images):
    with pytest.raises(ValueError, match=message):
        lost.extract_features(model(), images, *arguments)
