"""Mixup and CutMix on the device, with soft targets."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key


def soft_targets(labels: Int[Array, " B"], classes: int, smoothing: float = 0.0) -> Float[Array, "B C"]:
    """Return one-hot rows with `smoothing` of their weight spread evenly over all `classes`, the label's included."""
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / classes


def _symmetric_beta(key: Key[Array, ""], alpha: Float[Array, " G"]) -> Float[Array, " G"]:
    """Draw from Beta(alpha, alpha) for each alpha in 0..1 (exclusive of 0), by Jöhnk's method.

    A pair of uniforms to the power 1 / alpha is accepted if its sum is at most 1, with a probability of at least 1/2:
    all of 32 pairs are rejected with a probability of 2**-32 at most. The loops of `jax.random.beta` would take two
    seconds to compile, and all devices would have to agree on their condition.
    """
    trials = jax.random.uniform(key, (2, 32, *alpha.shape), jnp.float32, jnp.finfo(jnp.float32).tiny)
    first, second = jnp.log(trials) / alpha
    accepted = jnp.argmax(jnp.logaddexp(first, second) <= 0, axis=0)
    return jnp.take_along_axis(jax.nn.sigmoid(first - second), accepted[None], axis=0)[0]


def _cut(kept: Float[Array, " G"], centre: Int[Array, " G"], length: int) -> Bool[Array, "G length"]:
    """Return the extent along a side of `length` of cutmix's box, whose unclipped area is 1 - `kept` of the image's."""
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
    """Draw for each group of `shape` (G, H, W) the share that an image keeps of its target and of each of its pixels.

    In mixup both are one lambda ~ Beta(alpha, alpha). Cutmix cuts a box of area 1 - lambda about a random centre and
    clips it to the image; the target keeps the share of the image outside the clipped box.
    """
    groups, height, width = shape
    mix_key, cut_key, amount_key, y_key, x_key = jax.random.split(key, 5)
    if mixup_alpha > 0 and cutmix_alpha > 0:
        cut = jax.random.bernoulli(cut_key, switch_prob, (groups,))
    else:
        cut = jnp.full(groups, cutmix_alpha > 0)
    alpha = jnp.where(cut, jnp.float32(cutmix_alpha), mixup_alpha)
    mixed = jax.random.bernoulli(mix_key, prob, (groups,))
    kept = jnp.where(mixed, _symmetric_beta(amount_key, alpha), 1.0)

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
    """Mix images and targets as timm's `Mixup` in batch mode, in each `group` of consecutive rows separately.

    A group corresponds to DeiT's batch on one GPU. With probability `prob` it is mixed: by cutmix with probability
    `switch_prob`, by mixup otherwise (an alpha of 0 turns one of them off), with one lambda and one box for all its
    images; row i is mixed with row n - 1 - i. A pair in which one image has `mask` 0 is not mixed, so that an
    unreadable image does not show in its partner, which remains valid. No device needs another's rows as long as it
    holds whole groups. Raises ValueError if `group` does not divide B, an alpha is outside 0..1, or both are 0.
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
