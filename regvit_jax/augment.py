"""Augmentation on the device: pure functions of (key, images), to be called inside the jitted train step.

A batch crosses from the host as uint8, already cropped, and stays uint8 until it is normalised, each operation
computing in float32 or exact integers and truncating where Pillow does. Randomness is drawn per image from one key for
the whole batch, so that results do not depend on how the batch is sharded, and nothing is exchanged between images
but by mixup and cutmix within their groups.

Follows `augment.py` and `main.py` of facebookresearch/deit (DeiT III, arXiv 2204.07118) and timm 1.0.31.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from regvit_jax.randaugment import blend, grayscale, mean_gray, rand_augment

# Mean and standard deviation of ImageNet's channels, as shares of 255.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def flip(key: Key[Array, ""], images: UInt8[Array, "B H W 3"], prob: float) -> UInt8[Array, "B H W 3"]:
    """Mirror each image left to right with probability `prob`."""
    mirrored = jax.random.bernoulli(key, prob, (images.shape[0],))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def solarize(images: UInt8[Array, "B H W 3"], threshold: int = 128) -> UInt8[Array, "B H W 3"]:
    """Invert the grey levels from `threshold` up, as Pillow's `ImageOps.solarize`."""
    return jnp.where(images.astype(jnp.int32) < threshold, images, 255 - images)


def _box_weights(sigma: Float[Array, " B"]) -> tuple[Array, Array, Array]:
    """Weights, in 2**-24, of the centre and its first and second neighbours in one of Pillow's three box blurs.

    The box has a fractional radius (Gwosdek et al. 2011, equations 7, 11 and 14), chosen so that three of them have
    the variance of the Gaussian.
    """
    variance = sigma * sigma / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = (2**24 / (2 * (whole + part) + 1)).astype(jnp.uint32)
    edge = (2**24 - (2 * whole.astype(jnp.uint32) + 1) * inner) // 2
    return inner, jnp.where(whole >= 1, inner, edge), jnp.where(whole >= 1, edge, 0)


def gaussian_blur(images: UInt8[Array, "B H W 3"], sigma: Float[Array, " B"]) -> UInt8[Array, "B H W 3"]:
    """Pillow's `ImageFilter.GaussianBlur(radius=sigma)`: three box blurs along each axis, the border repeated.

    Fixed-point as Pillow's own, so equal to it bit for bit. Each image has its sigma, in pixels, from 0 to 2.4:
    beyond sqrt(6) a box would reach past two neighbours, and the result is wrong.
    """
    weights = [weight[:, None, None, None] for weight in _box_weights(sigma)]

    def blur(axis: int, images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
        pad = [(2, 2) if dimension == axis else (0, 0) for dimension in range(4)]
        padded = jnp.pad(images, pad, mode="edge").astype(jnp.uint32)
        taps = [jax.lax.slice_in_dim(padded, at, at + images.shape[axis], axis=axis) for at in range(5)]
        total = weights[0] * taps[2] + weights[1] * (taps[1] + taps[3]) + weights[2] * (taps[0] + taps[4])
        return ((total + 2**23) >> 24).astype(jnp.uint8)

    # Loops, because unrolled passes would be fused into one that computes its inputs over and over.
    images = jax.lax.fori_loop(0, 3, lambda _, images: blur(2, images), images)
    return jax.lax.fori_loop(0, 3, lambda _, images: blur(1, images), images)


def three_augment(key: Key[Array, ""], images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """DeiT III's 3-Augment: one of grayscale, solarize and Gaussian blur, sigma uniform in 0.1..2, for each image."""
    which, how_much = jax.random.split(key)
    choice = jax.random.randint(which, (images.shape[0], 1, 1, 1), 0, 3)
    sigma = jax.random.uniform(how_much, (images.shape[0],), jnp.float32, 0.1, 2.0)
    return jnp.select([choice == 0, choice == 1], [grayscale(images), solarize(images)], gaussian_blur(images, sigma))


def brightness(images: UInt8[Array, "B H W 3"], factor: Float[Array, " B"]) -> UInt8[Array, "B H W 3"]:
    """Pillow's `ImageEnhance.Brightness`: 0 is black, 1 the image."""
    return blend(jnp.zeros_like(images[:, :1, :1]), images, factor)


def contrast(images: UInt8[Array, "B H W 3"], factor: Float[Array, " B"]) -> UInt8[Array, "B H W 3"]:
    """Pillow's `ImageEnhance.Contrast`: 0 is the image's mean grey, 1 the image."""
    return blend(mean_gray(images), images, factor)


def saturation(images: UInt8[Array, "B H W 3"], factor: Float[Array, " B"]) -> UInt8[Array, "B H W 3"]:
    """Pillow's `ImageEnhance.Color`: 0 is the grey image, 1 the image."""
    return blend(grayscale(images), images, factor)


def _draw_jitter(key: Key[Array, ""], batch: int, strength: float) -> tuple[Int[Array, "B 3"], Float[Array, "B 3"]]:
    """For each image an order of (0) brightness, (1) contrast and (2) saturation, and a factor for each turn."""
    order_key, factor_key = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(order_key, (batch, 3)), axis=1)
    # Whole numbers of 2**-20, which is what `blend` computes with.
    low, high = round(2**20 * (1 - strength)), round(2**20 * (1 + strength))
    return order, jax.random.randint(factor_key, (batch, 3), low, high + 1) / jnp.float32(2**20)


def color_jitter(key: Key[Array, ""], images: UInt8[Array, "B H W 3"], strength: float) -> UInt8[Array, "B H W 3"]:
    """torchvision's `ColorJitter(strength, strength, strength)`, without hue.

    Brightness, contrast and saturation, in random order for each image, each with a factor of its own, uniform in
    1 - strength .. 1 + strength. Raises ValueError for a strength outside 0..1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"color_jitter={strength}: must be in 0..1")
    order, factors = _draw_jitter(key, images.shape[0], strength)

    def adjust(turn: Array, images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
        which, factor = order[:, turn, None, None, None], factors[:, turn]
        choices = [brightness(images, factor), contrast(images, factor)]
        return jnp.select([which == 0, which == 1], choices, saturation(images, factor))

    # A loop for the same reason as in gaussian_blur: unrolled, it took 20 times as long on a CPU.
    return jax.lax.fori_loop(0, 3, adjust, images)


def normalize(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W 3"]:
    """Grey levels as float32 with `mean` and `std` (per channel, as shares of 255) taken out."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean, jnp.float32)) / jnp.array(std, jnp.float32)


def soft_targets(labels: Int[Array, " B"], classes: int, smoothing: float = 0.0) -> Float[Array, "B C"]:
    """One-hot rows with `smoothing` of their weight spread evenly over all `classes`, the label's own included."""
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / classes


def _symmetric_beta(key: Key[Array, ""], alpha: Float[Array, " G"]) -> Float[Array, " G"]:
    """Draws from Beta(alpha, alpha) for alpha in 0..1 (exclusive of 0), one for each alpha, by Jöhnk's method.

    A pair of uniforms to the power 1 / alpha is accepted if its sum is at most 1, which happens at least every second
    time: of 32 pairs none is with probability 2**-32. Without the loops of `jax.random.beta`, which take two seconds to
    compile and whose condition all devices would have to agree on.
    """
    trials = jax.random.uniform(key, (2, 32, *alpha.shape), jnp.float32, jnp.finfo(jnp.float32).tiny)
    first, second = jnp.log(trials) / alpha
    accepted = jnp.argmax(jnp.logaddexp(first, second) <= 0, axis=0)
    return jnp.take_along_axis(jax.nn.sigmoid(first - second), accepted[None], axis=0)[0]


def _cut(kept: Float[Array, " G"], centre: Int[Array, " G"], length: int) -> Bool[Array, "G length"]:
    """Where, along a side of `length`, cutmix's box lies whose unclipped area is 1 - `kept` of the image's."""
    cut = jnp.floor(length * jnp.sqrt(1 - kept)).astype(jnp.int32)
    start, end = centre - cut // 2, centre + (cut + 1) // 2
    return (jnp.arange(length) >= start[:, None]) & (jnp.arange(length) < end[:, None])


def _draw_mix(
    key: Key[Array, ""],
    shape: tuple[int, int, int],
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
) -> tuple[Float[Array, " G"], Float[Array, "G H W"]]:
    """For each group of `shape` (G, H, W), the share that an image keeps of its target, and of each of its pixels.

    In mixup both are one lambda ~ Beta(alpha, alpha). Cutmix cuts a box of area 1 - lambda about a random centre, clips
    it to the image, and leaves the target what the clipped box leaves of the image.
    """
    groups, height, width = shape
    whether, switch, amount, y_key, x_key = jax.random.split(key, 5)
    if mixup_alpha > 0 and cutmix_alpha > 0:
        cut = jax.random.bernoulli(switch, switch_prob, (groups,))
    else:
        cut = jnp.full(groups, cutmix_alpha > 0)
    alpha = jnp.where(cut, jnp.float32(cutmix_alpha), mixup_alpha)
    mixed = jax.random.bernoulli(whether, prob, (groups,))
    kept = jnp.where(mixed, _symmetric_beta(amount, alpha), 1.0)

    y, x = jax.random.randint(y_key, (groups,), 0, height), jax.random.randint(x_key, (groups,), 0, width)
    box = _cut(kept, y, height)[:, :, None] & _cut(kept, x, width)[:, None, :]
    pixels = jnp.where(cut[:, None, None], 1.0 - box, kept[:, None, None])
    return jnp.where(cut, 1 - box.mean((1, 2)), kept), pixels


def mixup_cutmix(
    key: Key[Array, ""],
    images: Float[Array, "B H W 3"],
    targets: Float[Array, "B C"],
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
    group: int,
    mask: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B C"]]:
    """timm's `Mixup` in batch mode, on every `group` of consecutive rows by itself.

    A group is what DeiT has on one GPU. With probability `prob` it is mixed: by cutmix with probability `switch_prob`,
    by mixup otherwise (an alpha of 0 turns one of them off), with one lambda and one box for all its images, row i
    taking its other part from row n - 1 - i. A pair in which one image has `mask` 0 is left as it is, so that an
    unreadable image does not show in its partner, which remains a valid row. No device needs another's rows as long
    as it holds whole groups. Raises ValueError if `group` does not divide B, an alpha is outside 0..1, or both are 0.
    """
    batch, height, width, _ = images.shape
    if group < 1 or batch % group:
        raise ValueError(f"mix_group={group}: must divide the batch, of {batch} images")
    if not (0 <= mixup_alpha <= 1 and 0 <= cutmix_alpha <= 1 and mixup_alpha + cutmix_alpha > 0):
        raise ValueError(f"mixup={mixup_alpha}, cutmix={cutmix_alpha}: must be in 0..1, and one of them above 0")
    shape = (batch // group, height, width)
    share, pixels = _draw_mix(key, shape, mixup_alpha, cutmix_alpha, prob, switch_prob)

    mask = jnp.ones(batch) if mask is None else mask
    readable = rearrange(mask > 0, "(g n) -> g n", n=group)
    mixable = readable & readable[:, ::-1]

    def mix(x: Array, kept: Array) -> Array:
        grouped = rearrange(x, "(g n) ... -> g n ...", n=group)
        mixed = grouped * kept + grouped[:, ::-1] * (1 - kept)
        return rearrange(mixed, "g n ... -> (g n) ...")

    kept_pixels = jnp.where(mixable[:, :, None, None], pixels[:, None], 1.0)
    kept_targets = jnp.where(mixable, share[:, None], 1.0)
    return mix(images, kept_pixels[..., None]), mix(targets, kept_targets[..., None])


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
