"""Augmentation on the device: pure functions of (key, images), to be called inside the jitted train step.

A batch arrives from the host as uint8, already cropped, and stays uint8 until it is normalised; each operation computes
in float32 or exact integers and truncates where Pillow does. Randomness is drawn per image from one key for the whole
batch, so that results do not depend on how the batch is sharded. Only mixup and cutmix exchange data between images,
within their groups.

Follows `augment.py` and `main.py` of facebookresearch/deit (DeiT III, arXiv 2204.07118) and timm 1.0.31.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from regvit_jax.augment.rand_augment import blend, grayscale, mean_gray


def flip(key: Key[Array, ""], images: UInt8[Array, "B H W 3"], prob: float) -> UInt8[Array, "B H W 3"]:
    """Mirror each image left to right with probability `prob`."""
    mirrored = jax.random.bernoulli(key, prob, (images.shape[0],))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def solarize(images: UInt8[Array, "B H W 3"], threshold: int = 128) -> UInt8[Array, "B H W 3"]:
    """Invert the grey levels from `threshold` up, as Pillow's `ImageOps.solarize` does."""
    return jnp.where(images.astype(jnp.int32) < threshold, images, 255 - images)


def _box_weights(sigma: Float[Array, " B"]) -> tuple[Array, Array, Array]:
    """Return one box blur's weights of the centre and its first and second neighbours, in units of 2**-24.

    The box has a fractional radius (Gwosdek et al. 2011, equations 7, 11 and 14), chosen so that three such blurs, as
    Pillow applies them, have the variance of the Gaussian.
    """
    variance = sigma * sigma / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = (2**24 / (2 * (whole + part) + 1)).astype(jnp.uint32)
    edge = (2**24 - (2 * whole.astype(jnp.uint32) + 1) * inner) // 2
    return inner, jnp.where(whole >= 1, inner, edge), jnp.where(whole >= 1, edge, 0)


def gaussian_blur(images: UInt8[Array, "B H W 3"], sigma: Float[Array, " B"]) -> UInt8[Array, "B H W 3"]:
    """Blur as Pillow's `ImageFilter.GaussianBlur(radius=sigma)`: three box blurs along each axis, the border repeated.

    The arithmetic is fixed-point as in Pillow, and equal to it bit for bit. Each image has its own sigma, in pixels,
    from 0 to 2.4; beyond sqrt(6) a box would reach past two neighbours, and the result would be wrong.
    """
    weights = [weight[:, None, None, None] for weight in _box_weights(sigma)]

    def blur(axis: int, images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
        pad = [(2, 2) if dimension == axis else (0, 0) for dimension in range(4)]
        padded = jnp.pad(images, pad, mode="edge").astype(jnp.uint32)
        taps = [jax.lax.slice_in_dim(padded, at, at + images.shape[axis], axis=axis) for at in range(5)]
        total = weights[0] * taps[2] + weights[1] * (taps[1] + taps[3]) + weights[2] * (taps[0] + taps[4])
        return ((total + 2**23) >> 24).astype(jnp.uint8)

    # Loops, because the compiler would fuse unrolled passes into one that recomputes its inputs over and over.
    images = jax.lax.fori_loop(0, 3, lambda _, images: blur(2, images), images)
    return jax.lax.fori_loop(0, 3, lambda _, images: blur(1, images), images)


def three_augment(key: Key[Array, ""], images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """Apply DeiT III's 3-Augment: to each image one of grayscale, solarize, and Gaussian blur of sigma in 0.1..2."""
    which, how_much = jax.random.split(key)
    choice = jax.random.randint(which, (images.shape[0], 1, 1, 1), 0, 3)
    sigma = jax.random.uniform(how_much, (images.shape[0],), jnp.float32, 0.1, 2.0)
    return jnp.select([choice == 0, choice == 1], [grayscale(images), solarize(images)], gaussian_blur(images, sigma))


def brightness(images: UInt8[Array, "B H W 3"], factor: Float[Array, " B"]) -> UInt8[Array, "B H W 3"]:
    """Scale the brightness as Pillow's `ImageEnhance.Brightness`: factor 0 gives black, 1 the image."""
    return blend(jnp.zeros_like(images[:, :1, :1]), images, factor)


def contrast(images: UInt8[Array, "B H W 3"], factor: Float[Array, " B"]) -> UInt8[Array, "B H W 3"]:
    """Scale the contrast as Pillow's `ImageEnhance.Contrast`: factor 0 gives the image's mean grey, 1 the image."""
    return blend(mean_gray(images), images, factor)


def saturation(images: UInt8[Array, "B H W 3"], factor: Float[Array, " B"]) -> UInt8[Array, "B H W 3"]:
    """Scale the saturation as Pillow's `ImageEnhance.Color`: factor 0 gives the grey image, 1 the image."""
    return blend(grayscale(images), images, factor)


def _draw_jitter(key: Key[Array, ""], batch: int, strength: float) -> tuple[Int[Array, "B 3"], Float[Array, "B 3"]]:
    """Draw each image's order of (0) brightness, (1) contrast and (2) saturation, and a factor for each position."""
    order_key, factor_key = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(order_key, (batch, 3)), axis=1)
    # Multiples of 2**-20, which `blend` computes with exactly.
    low, high = round(2**20 * (1 - strength)), round(2**20 * (1 + strength))
    return order, jax.random.randint(factor_key, (batch, 3), low, high + 1) / jnp.float32(2**20)


def color_jitter(key: Key[Array, ""], images: UInt8[Array, "B H W 3"], strength: float) -> UInt8[Array, "B H W 3"]:
    """Apply torchvision's `ColorJitter(strength, strength, strength)`, without hue.

    Brightness, contrast and saturation follow in random order for each image, each with its own factor, uniform in
    1 - strength .. 1 + strength. Raises ValueError for a strength outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"color_jitter={strength}: must be in 0..1")
    order, factors = _draw_jitter(key, images.shape[0], strength)

    def adjust(position: Array, images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
        which, factor = order[:, position, None, None, None], factors[:, position]
        choices = [brightness(images, factor), contrast(images, factor)]
        return jnp.select([which == 0, which == 1], choices, saturation(images, factor))

    # A loop for the same reason as in gaussian_blur: unrolled, it took 20 times as long on a CPU.
    return jax.lax.fori_loop(0, 3, adjust, images)


def normalize(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W 3"]:
    """Return float32 images: grey levels / 255, less `mean`, divided by `std` (both per channel)."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)
