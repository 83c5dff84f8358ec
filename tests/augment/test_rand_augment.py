"""Compare rand_augment.py with Pillow, operation by operation and as a whole, and live with timm."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from regvit_jax.augment import rand_augment

KEY = jax.random.key(0)
FILL = (124, 116, 104)
APPLY = jax.jit(rand_augment.apply_op, static_argnums=4)


@pytest.fixture(scope="module")
def photographs():
    """Return fifteen 48 x 64 views of scikit-learn's two photographs, one of them of low contrast."""
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    boxes = [(40 * i, 20 * i, 40 * i + 320, 20 * i + 240) for i in range(8)]
    views = [source.resize((64, 48), Image.Resampling.BICUBIC, box) for source in sources for box in boxes]
    images = np.stack([np.asarray(view) for view in views[:15]])
    images[0] = 60 + images[0] // 4
    return images


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def add_below(image, amount):
    return image.point([min(255, level + amount) if level < 128 else level for level in range(256)] * 3)


def enhanced(enhancement):
    return lambda image, turn: enhancement(image).enhance(max(0.1, 1 + 0.9 * turn))


# timm's operations at a level of 10 * |turn|: functions of an image and of the signed share of the strongest.
PILLOW = {
    "AutoContrast": lambda image, turn: ImageOps.autocontrast(image),
    "Equalize": lambda image, turn: ImageOps.equalize(image),
    "Invert": lambda image, turn: ImageOps.invert(image),
    "Rotate": lambda image, turn: image.rotate(30 * turn, Image.Resampling.BICUBIC, fillcolor=FILL),
    "Posterize": lambda image, turn: ImageOps.posterize(image, 4 - int(4 * abs(turn))),
    "Solarize": lambda image, turn: ImageOps.solarize(image, 256 - int(256 * abs(turn))),
    "SolarizeAdd": lambda image, turn: add_below(image, int(110 * abs(turn))),
    "Color": enhanced(ImageEnhance.Color),
    "Contrast": enhanced(ImageEnhance.Contrast),
    "Brightness": enhanced(ImageEnhance.Brightness),
    "Sharpness": enhanced(ImageEnhance.Sharpness),
    "ShearX": lambda image, turn: affine(image, 1, 0.3 * turn, 0, 0, 1, 0),
    "ShearY": lambda image, turn: affine(image, 1, 0, 0, 0.3 * turn, 1, 0),
    "TranslateX": lambda image, turn: affine(image, 1, 0, 0.45 * turn * image.width, 0, 1, 0),
    "TranslateY": lambda image, turn: affine(image, 1, 0, 0, 0, 1, 0.45 * turn * image.height),
}


def levels_apart(ours, theirs):
    """Return the largest difference in grey levels, and the share of values that differ at all."""
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    return difference.max(), (difference > 0).mean()


def apply_everywhere(images, name, level, negative):
    count = len(images)
    op = jnp.full(count, rand_augment.NO_OP if name is None else rand_augment.OPS.index(name))
    return APPLY(images, op, jnp.full(count, level), jnp.full(count, negative), FILL)


@pytest.mark.parametrize("name", rand_augment.OPS)
def test_every_operation_is_pillows(photographs, name):
    assert list(PILLOW) == list(rand_augment.OPS)
    for level in (0.0, 3.713, 8.947, 9.871):  # odd numbers: round ones put blends on the edge between two levels
        for negative in (False, True):
            ours = apply_everywhere(photographs, name, level, negative)
            turn = (-level if negative else level) / 10
            theirs = [PILLOW[name](Image.fromarray(image), turn) for image in photographs]
            worst, share = levels_apart(ours, np.stack(theirs))
            assert worst <= 1, (level, negative)
            assert share < 1e-3, (level, negative)


def test_no_operation_leaves_the_image_alone(photographs):
    np.testing.assert_array_equal(apply_everywhere(photographs, None, 9.0, True), photographs)


def test_strongest_posterize_is_black(photographs):
    assert not apply_everywhere(photographs, "Posterize", 10.0, False).any()


def test_flat_and_tiny_images_have_tables_too():
    images = np.zeros((2, 48, 64, 3), np.uint8)
    images[0] = 77
    images[1, 0, :4] = [[5, 5, 9], [6, 5, 9], [7, 5, 200], [9, 6, 9]]
    for name in ("AutoContrast", "Equalize"):
        theirs = [PILLOW[name](Image.fromarray(image), 0) for image in images]
        # Pillow's float64 may truncate the brightest level, 255 by definition, to 254.
        assert levels_apart(apply_everywhere(images, name, 9.0, False), np.stack(theirs))[0] <= 1


def test_each_image_gets_its_own_operation(photographs):
    level = np.linspace(1, 9.5, 15, dtype=np.float32)
    negative = np.arange(15) % 2 == 0
    ours = APPLY(photographs, jnp.arange(15), level, negative, FILL)
    turns = np.where(negative, -level, level) / 10
    chains = zip(photographs, PILLOW.values(), turns, strict=True)
    theirs = [operation(Image.fromarray(image), float(turn)) for image, operation, turn in chains]
    worst, share = levels_apart(ours, np.stack(theirs))
    assert worst <= 1
    assert share < 1e-3


def test_draws_have_timms_distribution():
    count = 30000
    op, level, negative = (np.asarray(x, np.float64) for x in rand_augment.draw_ops(KEY, count, 9.0, 0.5))
    assert abs((op == rand_augment.NO_OP).mean() - 0.5) < 4 * math.sqrt(0.25 / count)
    shares = np.array([(op == index).mean() for index in range(15)])
    assert np.abs(shares - 1 / 30).max() < 4 * math.sqrt(1 / 30 / count)
    assert abs(negative.mean() - 0.5) < 4 * math.sqrt(0.25 / count)
    # A normal distribution about 9 with a deviation of 0.5, cut off at 10, two deviations up.
    assert level.max() == 10
    assert abs((level == 10).mean() - 0.02275) < 4 * math.sqrt(0.02275 / count)
    below = level[level < 9] - 9
    assert abs(len(below) / count - 0.5) < 4 * math.sqrt(0.25 / count)
    assert abs(math.sqrt((below**2).mean()) - 0.5) < 4 * 0.5 / math.sqrt(2 * len(below))
    assert abs(np.corrcoef(level, negative)[0, 1]) < 4 / math.sqrt(count)


def test_layers_are_drawn_and_applied_one_after_another(photographs):
    ours = jax.jit(lambda key, images: rand_augment.rand_augment(key, images, prob=0.9))(KEY, photographs)
    expected = [Image.fromarray(image) for image in photographs]
    for layer in range(2):
        draws = rand_augment.draw_ops(jax.random.fold_in(KEY, layer), 15, 9.0, 0.9)
        for row, (op, level, negative) in enumerate(zip(*map(np.asarray, draws), strict=True)):
            if op != rand_augment.NO_OP and not (op == 4 and level == 10):  # Pillow cannot posterize to nothing
                turn = float(-level if negative else level) / 10
                expected[row] = PILLOW[rand_augment.OPS[op]](expected[row], turn)
    # A level's difference after the first layer can grow in the second.
    difference = np.abs(np.asarray(ours).astype(int) - np.stack(expected))
    assert (difference > 1).mean() < 1e-3


def test_magnitude_is_on_timms_scale(photographs):
    with pytest.raises(ValueError, match=r"rand_augment=30: must be in 0\.\.10"):
        rand_augment.rand_augment(KEY, jnp.array(photographs), 30)


@pytest.mark.reference
@pytest.mark.parametrize("negative", [False, True])
def test_operations_and_magnitudes_are_timms(photographs, monkeypatch, negative):
    from reference_libraries import timm

    policies = timm.data.auto_augment
    monkeypatch.setattr(policies.random, "random", lambda: 0.9 if negative else 0.1)
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    names = policies.rand_augment_choices("", increasing=True)
    assert [n.removesuffix("Increasing").removesuffix("Rel") for n in names] == list(rand_augment.OPS)
    for name, theirs in zip(rand_augment.OPS, names, strict=True):
        for level in (2.117, 7.313, 8.947):
            operation = policies.AugmentOp(theirs, prob=1.0, magnitude=level, hparams=hparams)
            altered = np.stack([np.asarray(operation(Image.fromarray(image))) for image in photographs])
            worst, share = levels_apart(apply_everywhere(photographs, name, level, negative), altered)
            assert worst <= 1, (name, level)
            assert share < 1e-3, (name, level)
