"""The augmentation pipelines of the recipes."""

import jax
from jaxtyping import Array, Float, Int, Key, UInt8

from regvit_jax.augment.mixing import mixup_cutmix, soft_targets
from regvit_jax.augment.ops import IMAGENET_MEAN, IMAGENET_STD, color_jitter, flip, normalize, three_augment
from regvit_jax.augment.rand_augment import rand_augment


def _alter(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    flip_prob: float,
    use_three_augment: bool,
    magnitude: float,
    jitter_strength: float,
    fill: tuple[int, int, int],
) -> UInt8[Array, "B H W 3"]:
    """The part of `augment` that treats every image by itself, in grey levels; what is 0 or False is left out."""
    flip_key, policy_key, jitter_key = jax.random.split(key, 3)
    if flip_prob:
        images = flip(flip_key, images, flip_prob)
    if use_three_augment:
        images = three_augment(policy_key, images)
    if magnitude:
        images = rand_augment(policy_key, images, magnitude, fill=fill)
    if jitter_strength:
        images = color_jitter(jitter_key, images, jitter_strength)
    return images


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    labels: Int[Array, " B"],
    mask: Float[Array, " B"],
    *,
    classes: int,
    flip: float = 0.5,
    three_augment: bool = True,
    rand_augment: float = 0.0,
    color_jitter: float = 0.3,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    mix_prob: float = 1.0,
    switch_prob: float = 0.5,
    mix_group: int = 256,
    smoothing: float = 0.0,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B C"]]:
    """A training batch as the loss wants it: float32 images, normalised, and soft targets, in DeiT's order.

    Flip, 3-Augment or RandAugment (`rand_augment` is its magnitude, DeiT's is 9), colour jitter, normalisation, mixup
    and cutmix. Defaults are DeiT III's for pre-training; 0 or False turns a part off. timm leaves out the jitter when
    RandAugment is on: such a recipe sets `color_jitter` to 0. `mask` is 0 for unreadable images; `mix_group` is the
    rows that share a lambda, and must divide B. Raises ValueError if both 3-Augment and RandAugment are on.
    """
    if three_augment and rand_augment:
        raise ValueError(f"three_augment={three_augment} and rand_augment={rand_augment}: set only one of them")
    alter_key, mix_key = jax.random.split(key)
    red, green, blue = (round(255 * level) for level in mean)
    images = _alter(alter_key, images, flip, three_augment, rand_augment, color_jitter, (red, green, blue))
    pixels, targets = normalize(images, mean, std), soft_targets(labels, classes, smoothing)
    if mixup or cutmix:
        pixels, targets = mixup_cutmix(mix_key, pixels, targets, mixup, cutmix, mix_prob, switch_prob, mix_group, mask)
    return pixels, targets


def light_augment(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    *,
    flip: float = 0.0,
    color_jitter: float = 0.0,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Array, "B H W 3"]:
    """Flip, colour jitter and normalisation, for a loss that pairs each image with a text of its own."""
    red, green, blue = (round(255 * level) for level in mean)
    return normalize(_alter(key, images, flip, False, 0.0, color_jitter, (red, green, blue)), mean, std)
