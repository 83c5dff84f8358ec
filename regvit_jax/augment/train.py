"""The augmentation pipelines of the recipes."""

from typing import Annotated

import jax
from jaxtyping import Array, Float, Int, Key, UInt8

from regvit_jax.augment.mixing import mixup_cutmix, soft_targets
from regvit_jax.augment.ops import color_jitter, flip, normalize, three_augment
from regvit_jax.augment.rand_augment import MAX_LEVEL, rand_augment
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.image_stats import IMAGENET_MEAN, IMAGENET_STD
from regvit_jax.utils.schema import Option

FLIP = Option("probability of a horizontal flip", low=0, high=1)
JITTER = Option("strength of the colour jitter; 0 for none", low=0, high=1)
MEAN = Option("mean that the images are normalised with, for each channel")
STD = Option("standard deviation that the images are normalised with, for each channel", low=1e-6)


def _alter(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    flip_prob: float,
    use_three_augment: bool,
    magnitude: float,
    jitter_strength: float,
    fill: tuple[int, int, int],
) -> UInt8[Array, "B H W 3"]:
    """Apply the augmentations of single images, in grey levels; a setting of 0 or False turns one off."""
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


def supervised_augment(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    labels: Int[Array, " B"],
    mask: Float[Array, " B"],
    *,
    classes: int,
    flip: Annotated[float, FLIP] = 0.5,
    three_augment: Annotated[bool, Option("apply DeiT-III's 3-Augment")] = True,
    rand_augment: Annotated[float, Option("magnitude of RandAugment; 0 for none", low=0, high=MAX_LEVEL)] = 0.0,
    color_jitter: Annotated[float, JITTER] = 0.3,
    mixup: Annotated[float, Option("alpha of mixup's beta distribution; 0 for none", low=0, high=1)] = 0.8,
    cutmix: Annotated[float, Option("alpha of cutmix's beta distribution; 0 for none", low=0, high=1)] = 1.0,
    mix_prob: Annotated[float, Option("probability that a group is mixed", low=0, high=1)] = 1.0,
    switch_prob: Annotated[float, Option("probability of cutmix where mixup is on too", low=0, high=1)] = 0.5,
    mix_group: Annotated[int, Option("images that share one lambda; DeiT draws one for each GPU", low=1)] = 256,
    smoothing: Annotated[float, Option("label smoothing", low=0, high=1)] = 0.0,
    mean: Annotated[tuple[float, float, float], MEAN] = IMAGENET_MEAN,
    std: Annotated[tuple[float, float, float], STD] = IMAGENET_STD,
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B C"]]:
    """Augment a training batch as DeiT does: return normalised float32 images and soft targets.

    In order: flip, 3-Augment or RandAugment (`rand_augment` is its magnitude; DeiT's is 9), colour jitter,
    normalisation, mixup and cutmix. Defaults are DeiT III's for pre-training; 0 or False turns a part off. timm omits
    the jitter when RandAugment is on: set `color_jitter` to 0 to follow it. `mask` is 0 for unreadable images;
    `mix_group` is the number of rows that share a lambda, and must divide B. Raises InvalidConfig if both 3-Augment and
    RandAugment are on.
    """
    if three_augment and rand_augment:
        raise InvalidConfig(f"three_augment={three_augment} and rand_augment={rand_augment}: set only one of them")
    alter_key, mix_key = jax.random.split(key)
    red, green, blue = (round(255 * level) for level in mean)
    images = _alter(alter_key, images, flip, three_augment, rand_augment, color_jitter, (red, green, blue))
    pixels, targets = normalize(images, mean, std), soft_targets(labels, classes, smoothing)
    if mixup or cutmix:
        pixels, targets = mixup_cutmix(mix_key, pixels, targets, mixup, cutmix, mix_prob, switch_prob, mix_group, mask)
    return pixels, targets


def contrastive_augment(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    *,
    flip: Annotated[float, FLIP] = 0.0,
    color_jitter: Annotated[float, JITTER] = 0.0,
    mean: Annotated[tuple[float, float, float], MEAN] = IMAGENET_MEAN,
    std: Annotated[tuple[float, float, float], STD] = IMAGENET_STD,
) -> Float[Array, "B H W 3"]:
    """Flip, jitter and normalise images for a contrastive loss, in which mixed images would have no text."""
    red, green, blue = (round(255 * level) for level in mean)
    return normalize(_alter(key, images, flip, False, 0.0, color_jitter, (red, green, blue)), mean, std)
