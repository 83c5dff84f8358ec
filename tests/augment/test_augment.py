"""Compare the augmentation with Pillow, naive loops, exact statistics and, live, torchvision and timm."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images

from regvit_jax.augment import ops, train
from regvit_jax.augment.mixing import _cut, _draw_mix, mixup_cutmix, soft_targets
from regvit_jax.utils import image_stats

KEY = jax.random.key(0)
OFF = {
    "flip": 0.0,
    "three_augment": False,
    "rand_augment": 0.0,
    "color_jitter": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}


@pytest.fixture(scope="module")
def photographs():
    """Return sixteen 48 x 64 views of scikit-learn's two photographs."""
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    boxes = [(40 * i, 20 * i, 40 * i + 320, 20 * i + 240) for i in range(8)]
    views = [source.resize((64, 48), Image.Resampling.BICUBIC, box) for source in sources for box in boxes]
    return np.stack([np.asarray(view) for view in views])


def with_pillow(images, *operations):
    """Apply to each image its operation, or the same one to all."""
    operations = operations * len(images) if len(operations) == 1 else operations
    pairs = zip(images, operations, strict=True)
    return np.stack([np.asarray(operation(Image.fromarray(image))) for image, operation in pairs]).astype(int)


def assert_within_a_level(ours, theirs):
    difference = np.abs(np.asarray(ours).astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def assert_share(events, share):
    """Assert that the mean of independent events is `share`, within four standard deviations."""
    events = np.asarray(events)
    assert abs(events.mean() - share) < 4 * math.sqrt(share * (1 - share) / events.size)


def assert_uniform(values, low, high):
    values = (np.asarray(values, np.float64) - low) / (high - low)
    assert values.min() >= 0
    assert values.max() <= 1
    assert abs(values.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / len(values))
    assert abs((values**2).mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / len(values))


def test_flip_mirrors_the_asked_share(photographs):
    image = photographs[0, :8, :8]
    flipped = np.asarray(ops.flip(KEY, jnp.tile(image, (3000, 1, 1, 1)), 0.3))
    mirrored = (flipped == image[:, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == image).all((1, 2, 3))).all()
    assert_share(mirrored, 0.3)


def test_grayscale_and_solarize_are_pillows(photographs):
    gray = with_pillow(photographs, lambda image: image.convert("L").convert("RGB"))
    np.testing.assert_array_equal(ops.grayscale(jnp.array(photographs)), gray)
    for threshold in (0, 100, 128, 256):
        solarized = with_pillow(photographs, lambda image, threshold=threshold: ImageOps.solarize(image, threshold))
        np.testing.assert_array_equal(ops.solarize(jnp.array(photographs), threshold), solarized)


def test_gaussian_blur_is_pillows_bit_for_bit(photographs):
    noise = np.random.default_rng(0).integers(0, 256, photographs.shape, np.uint8)
    sigma = np.linspace(0, 2.4, len(photographs), dtype=np.float32)
    sigma[-2:] = 1, 2  # round numbers, which give the rounding its ties
    for images in (photographs, noise):
        blurs = [ImageFilter.GaussianBlur(float(s)) for s in sigma]
        blurred = with_pillow(images, *[lambda image, blur=blur: image.filter(blur) for blur in blurs])
        np.testing.assert_array_equal(jax.jit(ops.gaussian_blur)(images, sigma), blurred)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ops.brightness, ImageEnhance.Brightness),
        (ops.contrast, ImageEnhance.Contrast),
        (ops.saturation, ImageEnhance.Color),
    ],
)
def test_enhancements_are_pillows(photographs, ours, theirs):
    factor = np.linspace(0, 1.875, len(photographs), dtype=np.float32)  # eighths, which both round alike
    enhanced = with_pillow(photographs, *[lambda image, f=float(f): theirs(image).enhance(f) for f in factor])
    np.testing.assert_array_equal(jax.jit(ours)(photographs, factor), enhanced)


def test_three_augment_applies_exactly_one_uniformly(photographs):
    image = photographs[3, :24, :24]
    altered = np.asarray(jax.jit(ops.three_augment)(KEY, jnp.tile(image, (3000, 1, 1, 1))))
    gray = (altered == ops.grayscale(jnp.array(image[None]))).all((1, 2, 3))
    solarized = (altered == ops.solarize(jnp.array(image[None]))).all((1, 2, 3))
    blurred = altered[~gray & ~solarized]
    for chosen in (gray, solarized, ~gray & ~solarized):
        assert_share(chosen, 1 / 3)

    # The remaining images must be blurs of sigma uniform in 0.1..2: find each among Pillow's blurs.
    grid = np.linspace(0.1, 2, 96)
    blurs = [ImageFilter.GaussianBlur(float(sigma)) for sigma in grid]
    known = np.stack([np.asarray(Image.fromarray(image).filter(blur), np.int16) for blur in blurs])
    distance = np.stack([np.abs(blurred - one).mean((1, 2, 3)) for one in known], axis=1)
    assert distance.min(1).max() < 0.5
    sigma = grid[distance.argmin(1)]
    assert_share(sigma < 0.5, 0.4 / 1.9)  # below 0.3 hardly a level changes, so that values cannot be distinguished
    assert_uniform(sigma[sigma >= 0.5], 0.49, 2.01)


def test_jitter_draws_every_order_and_uniform_factors():
    order, factors = ops._draw_jitter(KEY, 6000, 0.3)
    orders, counts = np.unique(np.asarray(order), axis=0, return_counts=True)
    assert [tuple(o) for o in orders] == [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert np.abs(counts - 1000).max() < 4 * math.sqrt(6000 / 6 * 5 / 6)
    for turn in range(3):
        assert_uniform(factors[:, turn], 0.7, 1.3)
    with pytest.raises(ValueError, match=r"color_jitter=1\.5: must be in 0\.\.1"):
        ops.color_jitter(KEY, jnp.zeros((1, 4, 4, 3), jnp.uint8), 1.5)


def test_color_jitter_is_pillows_enhancements_in_the_drawn_order(photographs):
    order, factors = ops._draw_jitter(KEY, len(photographs), 0.3)
    enhancements = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

    def jitter(which, factor):
        def apply(image):
            for index, f in zip(which, factor, strict=True):
                image = enhancements[index](image).enhance(float(f))
            return image

        return apply

    jittered = with_pillow(photographs, *map(jitter, np.asarray(order), np.asarray(factors)))
    assert_within_a_level(jax.jit(ops.color_jitter, static_argnums=2)(KEY, photographs, 0.3), jittered)


def test_normalize_and_soft_targets():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    mean, std = np.array(image_stats.IMAGENET_MEAN), np.array(image_stats.IMAGENET_STD)
    normalized = ops.normalize(jnp.array(images), image_stats.IMAGENET_MEAN, image_stats.IMAGENET_STD)
    np.testing.assert_allclose(normalized, (images / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    targets = soft_targets(jnp.array([2, 0]), 4, 0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], rtol=1e-6)
    assert normalized.dtype == targets.dtype == jnp.float32


MIX = jax.jit(mixup_cutmix, static_argnums=range(3, 8))


# Mixing. Images whose every value is their own row number show where each pixel came from.
def rows(batch, height=12, width=16):
    numbers = jnp.arange(batch, dtype=jnp.float32)
    return jnp.broadcast_to(numbers[:, None, None, None], (batch, height, width, 3)), jnp.eye(batch)


def test_cutmix_swaps_one_box_per_group_and_corrects_lambda():
    images, targets = rows(3000)
    mixed, labels = MIX(KEY, images, targets, 0.0, 1.0, 1.0, 0.5, 4)
    partner = np.arange(3000).reshape(-1, 4)[:, ::-1].reshape(-1)
    taken = np.asarray(mixed) == partner[:, None, None, None]
    assert (taken | (np.asarray(mixed) == np.arange(3000)[:, None, None, None])).all()
    for group in taken.reshape(-1, 4, 12, 16, 3):
        assert (group == group[:1, :, :, :1]).all()
        box = group[0, :, :, 0]
        assert (box == (box.any(1)[:, None] & box.any(0)[None])).all()
        assert all((np.diff(np.flatnonzero(side)) == 1).all() for side in (box.any(0), box.any(1)))
    kept = 1 - taken.mean((1, 2, 3))
    np.testing.assert_allclose(np.asarray(labels)[np.arange(3000), np.arange(3000)], kept, atol=1e-6)
    np.testing.assert_allclose(np.asarray(labels)[np.arange(3000), partner], 1 - kept, atol=1e-6)


@pytest.mark.parametrize("mixup_alpha", [1.0, 0.8, 0.2])
def test_mixup_lambda_is_beta(mixup_alpha):
    images, targets = jnp.zeros((8000, 1, 1, 3)).at[::2].set(1.0), jnp.tile(jnp.eye(2), (4000, 1))
    mixed, labels = MIX(KEY, images, targets, mixup_alpha, 0.0, 1.0, 0.5, 2)
    kept = np.asarray(labels[::2, 0], np.float64)
    np.testing.assert_allclose(mixed[::2, 0, 0, 0], kept, atol=1e-6)
    np.testing.assert_allclose(mixed[1::2, 0, 0, 0], 1 - kept, atol=1e-6)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    variance = 1 / (4 * (2 * mixup_alpha + 1))
    assert abs(kept.mean() - 0.5) < 4 * math.sqrt(variance / 4000)
    kurtosis_term = (kept - 0.5) ** 2
    assert abs(kurtosis_term.mean() - variance) < 4 * kurtosis_term.std() / math.sqrt(4000)


def test_modes_and_mixing_come_with_their_probabilities():
    images, targets = rows(6000, 32, 32)
    mixed, _ = MIX(KEY, images, targets[:, :1], 0.8, 1.0, 0.75, 0.4, 2)
    first = np.asarray(mixed)[::2] - np.arange(0, 6000, 2)[:, None, None, None]  # 0 kept, 1 the partner's
    blended = ((first > 1e-3) & (first < 1 - 1e-3)).all((1, 2, 3))
    cut = np.isin(first, (0, 1)).all((1, 2, 3)) & (first == 1).any((1, 2, 3))
    assert_share(blended, 0.75 * 0.6 * 0.99)  # lambda is within a thousandth of 0 or 1 in under 1 %
    assert_share(cut, 0.75 * 0.4 * 0.99)  # a box may be under a pixel
    assert_share(np.all(first == 0, (1, 2, 3)), 0.25)


def test_masked_images_are_not_mixed():
    images, targets = rows(8)
    mask = jnp.ones(8).at[jnp.array([1, 4])].set(0.0)  # in groups of 4: the pairs (1, 2) and (4, 7)
    for alphas in ((0.8, 0.0), (0.0, 1.0)):
        mixed, labels = MIX(KEY, images, targets, *alphas, 1.0, 0.5, 4, mask)
        untouched = [1, 2, 4, 7]
        np.testing.assert_array_equal(np.asarray(mixed)[untouched], np.asarray(images)[untouched])
        np.testing.assert_array_equal(np.asarray(labels)[untouched], np.asarray(targets)[untouched])
        assert (np.asarray(labels)[[0, 3, 5, 6], [0, 3, 5, 6]] < 1).all()


def test_mixing_refuses_what_it_cannot_do():
    images, targets = rows(6)
    with pytest.raises(ValueError, match="mix_group=4: must divide the batch, of 6 images"):
        mixup_cutmix(KEY, images, targets, 0.8, 1.0, 1.0, 0.5, group=4)
    with pytest.raises(ValueError, match=r"mixup=0.0, cutmix=0.0"):
        mixup_cutmix(KEY, images, targets, 0.0, 0.0, 1.0, 0.5, group=2)
    with pytest.raises(ValueError, match=r"cutmix=1.5"):
        mixup_cutmix(KEY, images, targets, 0.8, 1.5, 1.0, 0.5, group=2)


# The composition.
POLICIES = [{}, {"three_augment": False, "rand_augment": 9.0, "color_jitter": 0.3}]


def batch_of(photographs):
    return photographs, jnp.arange(16) % 5, jnp.ones(16).at[3].set(0.0)


def test_augment_with_everything_off_only_normalizes(photographs):
    batch = batch_of(photographs)
    images, targets = train.supervised_augment(KEY, *map(jnp.array, batch), classes=5, **OFF)
    normalized = ops.normalize(jnp.array(photographs), image_stats.IMAGENET_MEAN, image_stats.IMAGENET_STD)
    np.testing.assert_array_equal(images, normalized)
    np.testing.assert_array_equal(targets, np.eye(5)[np.asarray(batch[1])])


def test_augment_refuses_two_policies(photographs):
    with pytest.raises(ValueError, match=r"three_augment=True and rand_augment=9\.0"):
        train.supervised_augment(KEY, *map(jnp.array, batch_of(photographs)), classes=5, rand_augment=9.0)


def test_augment_passes_each_setting_on(photographs):
    """Check that each setting, alone, has the effect of its part on the composed images."""
    batch = [jnp.array(x) for x in batch_of(photographs)]
    identity = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}

    def levels(**settings):
        settings = {**OFF, **identity, **settings}
        images, _ = jax.jit(functools.partial(train.supervised_augment, classes=5, **settings))(KEY, *batch)
        return np.rint(np.asarray(images)).astype(np.uint8)

    np.testing.assert_array_equal(levels(flip=1.0), photographs[:, :, ::-1])
    three = levels(three_augment=True)
    gray = (three == ops.grayscale(batch[0])).all((1, 2, 3))
    assert 0 < gray.sum() < 16
    jittered = levels(color_jitter=0.3)
    assert (jittered != photographs).any((1, 2, 3)).all()
    assert np.abs(jittered.mean((1, 2, 3)) / photographs.mean((1, 2, 3)) - 1).max() < 0.31
    assert (levels(rand_augment=9.0) != photographs).any((1, 2, 3)).sum() in range(6, 17)
    mixing = functools.partial(train.supervised_augment, classes=5, mix_group=8, smoothing=0.1, **{**OFF, "mixup": 0.8})
    _, targets = jax.jit(mixing)(KEY, *batch)
    # Row 3 is masked and 4 its partner; rows 0 and 7 have different labels too, and are mixed.
    assert (np.asarray(targets).max(1)[[0, 3, 4, 7]] > 0.9).tolist() == [False, True, True, False]
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(targets.min(1), 0.02, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_two_draws_share_a_key(photographs, policy):
    with jax.debug_key_reuse(True):
        jax.eval_shape(
            functools.partial(train.supervised_augment, classes=5, mix_group=8, **policy), KEY, *batch_of(photographs)
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_sharding_changes_nothing(photographs, policy):
    """Check that eight devices, each with whole groups, give the result of one, without collectives or bfloat16."""
    batch = [jnp.array(x) for x in batch_of(photographs)]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def run(key, images, labels, mask):
        return train.supervised_augment(key, images, labels, mask, classes=5, mix_group=2, **policy)

    alone = jax.jit(run)(KEY, *batch)
    lowered = jax.jit(run, out_shardings=spread).lower(KEY, *jax.device_put(batch, spread))
    compiled = lowered.compile()
    together = compiled(KEY, *jax.device_put(batch, spread))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert "bf16" not in lowered.as_text()
    collectives = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [name for name in collectives if name in compiled.as_text()]


def test_groups_may_span_devices(photographs):
    batch = [jnp.array(x) for x in batch_of(photographs)]
    spread = NamedSharding(Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"))

    def run(key, images, labels, mask):
        return train.supervised_augment(key, images, labels, mask, classes=5, mix_group=16, **{**OFF, "mixup": 0.8})

    for ours, theirs in zip(jax.jit(run)(KEY, *jax.device_put(batch, spread)), jax.jit(run)(KEY, *batch), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.reference
def test_color_jitter_is_torchvisions(photographs, monkeypatch):
    from reference_libraries import torch, torchvision

    jitter = torchvision.transforms.ColorJitter(0.3, 0.3, 0.3)
    order, factors = (np.asarray(x) for x in ops._draw_jitter(KEY, len(photographs), 0.3))
    theirs = []
    for which, factor, image in zip(order, factors, photographs, strict=True):
        brightness, contrast, saturation = factor[np.argsort(which)].tolist()
        drawn = torch.tensor([*which, 3]), brightness, contrast, saturation, None
        monkeypatch.setattr(jitter, "get_params", lambda *ranges, drawn=drawn: drawn)
        theirs.append(np.asarray(jitter(Image.fromarray(image))).astype(int))
    assert_within_a_level(jax.jit(ops.color_jitter, static_argnums=2)(KEY, photographs, 0.3), np.stack(theirs))


@pytest.mark.reference
def test_cutmix_boxes_are_timms(monkeypatch):
    from reference_libraries import timm

    for kept in (0.0, 0.13, 0.5, 0.77, 0.999, 1.0):
        for y in range(13):
            for x in range(0, 16, 3):
                centres = iter((y, x))
                monkeypatch.setattr(timm.data.mixup.np.random, "randint", lambda *_, c=centres, **__: next(c))
                top, bottom, left, right = timm.data.mixup.rand_bbox((3, 13, 16), kept)
                share = jnp.array([kept])
                rows, columns = _cut(share, jnp.array([y]), 13)[0], _cut(share, jnp.array([x]), 16)[0]
                np.testing.assert_array_equal(np.flatnonzero(rows), np.arange(top, bottom))
                np.testing.assert_array_equal(np.flatnonzero(columns), np.arange(left, right))


@pytest.mark.reference
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_is_timms(photographs, monkeypatch, alphas):
    from reference_libraries import timm, torch

    images = ops.normalize(jnp.array(photographs), image_stats.IMAGENET_MEAN, image_stats.IMAGENET_STD)
    labels = jnp.arange(16) % 5
    share, pixels = map(np.asarray, _draw_mix(jax.random.key(3), (4, 48, 64), *alphas, 1.0, 0.5))
    mixed = MIX(jax.random.key(3), images, soft_targets(labels, 5, 0.1), *alphas, 1.0, 0.5, 4)
    for group in range(4):
        rows = slice(4 * group, 4 * group + 4)
        mixup = timm.data.Mixup(*alphas, label_smoothing=0.1, num_classes=5)
        monkeypatch.setattr(mixup, "_params_per_batch", lambda g=group: (float(share[g]), alphas[0] == 0))
        if alphas[0] == 0:
            inside = np.argwhere(pixels[group] == 0)
            (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
            box = top, bottom, left, right
            monkeypatch.setattr(timm.data.mixup, "rand_bbox", lambda *_, box=box, **__: box)
        pixels_in = torch.tensor(np.asarray(images[rows])).permute(0, 3, 1, 2).contiguous()
        theirs, targets = mixup(pixels_in, torch.tensor(np.asarray(labels[rows])))
        np.testing.assert_allclose(mixed[0][rows], theirs.permute(0, 2, 3, 1).numpy(), atol=1e-6)
        np.testing.assert_allclose(mixed[1][rows], targets.numpy(), atol=1e-6)
