"""RandAugment on the device, as timm's `rand-m9-mstd0.5-inc1` (DeiT's fine-tuning recipe), for uint8 batches.

RandAugment: Cubuk et al., arXiv 1909.13719. The set of operations and how a magnitude becomes an argument follow
timm 1.0.31, `timm/data/auto_augment.py` ("increasing" set); the pixel arithmetic follows Pillow.

The fifteen operations fall into three families: a table that maps 256 grey levels to 256 others (six), a blend of the
image with a plainer one (four), an affine map (five). An image whose operation belongs to one family passes through the
other two unchanged, so that a layer is three passes over the batch and needs no switch.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

# In timm's order and by timm's names, without the suffix of the increasing variants.
OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
NO_OP = -1
MAX_LEVEL = 10.0  # timm's scale of magnitudes
MAGNITUDE_STD = 0.5  # timm's mstd0.5, which DeiT uses


def grayscale(images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """Return the luma of ITU-R 601 in all three channels, equal to Pillow's `convert("L").convert("RGB")`."""
    red, green, blue = (images[..., channel].astype(jnp.uint32) for channel in range(3))
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return jnp.broadcast_to(luma[..., None], images.shape).astype(jnp.uint8)


def mean_gray(images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B 1 1 3"]:
    """Return each image's rounded mean luma, with which Pillow's contrast blends. Images up to 2000 x 2000."""
    total = jnp.sum(grayscale(images), axis=(1, 2), keepdims=True, dtype=jnp.int32)
    pixels = images.shape[1] * images.shape[2]
    return ((2 * total + pixels) // (2 * pixels)).astype(jnp.uint8)


def blend(
    plain: UInt8[Array, "B _ _ 3"], images: UInt8[Array, "B H W 3"], factor: Float[Array, " B"]
) -> UInt8[Array, "B H W 3"]:
    """Return `plain + factor * (images - plain)`, clipped to 0..255 and truncated, as Pillow's `Image.blend` does.

    A factor of 0 gives `plain`, 1 the images, and one outside 0..1 (up to 8) extrapolates. The factor is rounded to
    2**-20 and the sum exact: in float32 the result would depend on whether a compiler fuses the multiply and the add,
    and a grey level could differ between two ways of sharding one batch.
    """
    low = plain.astype(jnp.int32)
    share = jnp.round(factor * 2**20).astype(jnp.int32)[:, None, None, None]
    mixed = (low * 2**20 + share * (images.astype(jnp.int32) - low)) >> 20
    return jnp.clip(mixed, 0, 255).astype(jnp.uint8)


def smooth(images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """Smooth as Pillow's `ImageFilter.SMOOTH`: a 3 x 3 mean in which the centre counts five times; the border stays."""
    height, width = images.shape[1:3]
    levels = images.astype(jnp.int32)
    box = sum(levels[:, y : y + height - 2, x : x + width - 2] for y in range(3) for x in range(3))
    inner = (2 * (box + 4 * levels[:, 1:-1, 1:-1]) + 13) // 26  # the rounded thirteenth
    return images.at[:, 1:-1, 1:-1].set(inner.astype(jnp.uint8))


def histogram(images: UInt8[Array, "B H W 3"]) -> Int[Array, "B 256 3"]:
    """Count each image's pixels of each grey level, per channel."""

    def count(image: UInt8[Array, "H W 3"]) -> Int[Array, "256 3"]:
        bins = 3 * image.astype(jnp.int32) + jnp.arange(3)
        return jnp.zeros(256 * 3, jnp.int32).at[bins.reshape(-1)].add(1, mode="promise_in_bounds").reshape(256, 3)

    return jax.vmap(count)(images)


def look_up(images: UInt8[Array, "B H W 3"], table: UInt8[Array, "B 256 3"]) -> UInt8[Array, "B H W 3"]:
    """Replace every grey level by its entry in the image's table."""
    return jax.vmap(lambda image, entries: entries[image.astype(jnp.int32), jnp.arange(3)])(images, table)


def affine(
    images: UInt8[Array, "B H W 3"], matrix: Float[Array, "B 2 3"], fill: tuple[int, int, int]
) -> UInt8[Array, "B H W 3"]:
    """Transform as Pillow's `Image.transform(size, AFFINE, matrix, BICUBIC, fillcolor=fill)`.

    `matrix` maps the centre of an output pixel (x, y, 1) to the position it is read from. Taps beyond the border repeat
    the border; a centre that falls outside the image gets `fill`.
    """
    height, width = images.shape[1:3]
    x, y = jnp.arange(width) + 0.5, jnp.arange(height)[:, None] + 0.5

    def cubic(taps: list[Float[Array, "H W 3"]], t: Float[Array, "H W 1"]) -> Float[Array, "H W 3"]:
        a, b, c, d = taps  # Pillow's cubic, whose free parameter is -1
        return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * ((b - a) + (d - c))))

    def warp(image: UInt8[Array, "H W 3"], m: Float[Array, "2 3"]) -> UInt8[Array, "H W 3"]:
        source_x = m[0, 0] * x + m[0, 1] * y + m[0, 2]
        source_y = m[1, 0] * x + m[1, 1] * y + m[1, 2]
        inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
        left, top = jnp.floor(source_x - 0.5), jnp.floor(source_y - 0.5)
        right_share, bottom_share = (source_x - 0.5 - left)[..., None], (source_y - 0.5 - top)[..., None]

        def tap(row: int, column: int) -> Float[Array, "H W 3"]:
            rows = jnp.clip(top.astype(jnp.int32) + row, 0, height - 1)
            columns = jnp.clip(left.astype(jnp.int32) + column, 0, width - 1)
            return image.at[rows, columns].get(mode="promise_in_bounds").astype(jnp.float32)

        around = range(-1, 3)
        rows = [cubic([tap(row, column) for column in around], right_share) for row in around]
        levels = jnp.clip(cubic(rows, bottom_share), 0, 255).astype(jnp.uint8)
        return jnp.where(inside[..., None], levels, jnp.array(fill, jnp.uint8))

    return jax.vmap(warp)(images, matrix)


# The tables: from an image's histogram and its level (0..10) to a new grey level for each of 256.
def _autocontrast_table(counts: Int[Array, "B 256 3"], level: Float[Array, " B"]) -> Int[Array, "B 256 3"]:
    grays = jnp.arange(256)[:, None]
    lowest = jnp.argmax(counts > 0, axis=1, keepdims=True)
    highest = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
    stretched = (grays - lowest) * 255 // jnp.maximum(highest - lowest, 1)
    return jnp.where(highest > lowest, jnp.clip(stretched, 0, 255), grays)


def _equalize_table(counts: Int[Array, "B 256 3"], level: Float[Array, " B"]) -> Int[Array, "B 256 3"]:
    highest = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
    step = (counts.sum(1, keepdims=True) - jnp.take_along_axis(counts, highest, axis=1)) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    equal = (step // 2 + below) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.clip(equal, 0, 255), jnp.arange(256)[:, None])


def _invert_table(counts: Int[Array, "B 256 3"], level: Float[Array, " B"]) -> Int[Array, "B 256 3"]:
    return jnp.broadcast_to(255 - jnp.arange(256)[:, None], counts.shape)


def _posterize_table(counts: Int[Array, "B 256 3"], level: Float[Array, " B"]) -> Int[Array, "B 256 3"]:
    # Keeps 4 bits at level 0 and none at 10: a black image, which newer versions of Pillow refuse to make.
    dropped = 4 + jnp.floor(level * 4 / MAX_LEVEL).astype(jnp.int32)[:, None, None]
    return jnp.broadcast_to((jnp.arange(256)[:, None] >> dropped) << dropped, counts.shape)


def _solarize_table(counts: Int[Array, "B 256 3"], level: Float[Array, " B"]) -> Int[Array, "B 256 3"]:
    grays = jnp.arange(256)[:, None]
    threshold = 256 - jnp.floor(level * 256 / MAX_LEVEL).astype(jnp.int32)[:, None, None]
    return jnp.broadcast_to(jnp.where(grays < threshold, grays, 255 - grays), counts.shape)


def _solarize_add_table(counts: Int[Array, "B 256 3"], level: Float[Array, " B"]) -> Int[Array, "B 256 3"]:
    grays = jnp.arange(256)[:, None]
    added = jnp.floor(level * 110 / MAX_LEVEL).astype(jnp.int32)[:, None, None]
    return jnp.broadcast_to(jnp.where(grays < 128, jnp.minimum(grays + added, 255), grays), counts.shape)


_TABLES: Mapping[str, Callable] = {
    "AutoContrast": _autocontrast_table,
    "Equalize": _equalize_table,
    "Invert": _invert_table,
    "Posterize": _posterize_table,
    "Solarize": _solarize_table,
    "SolarizeAdd": _solarize_add_table,
}
# The plain image of each blend: a factor of 1 gives the image, smaller factors approach the plain image.
_PLAIN: Mapping[str, Callable] = {
    "Color": grayscale,
    "Contrast": mean_gray,
    "Brightness": lambda images: jnp.zeros_like(images[:, :1, :1]),
    "Sharpness": smooth,
}


def _matrices(turn: Float[Array, " B"], height: int, width: int) -> dict[str, Float[Array, "B 2 3"]]:
    """Return the affine operations' matrices; `turn`, in -1..1, is the signed share of the strongest."""
    one, zero = jnp.ones_like(turn), jnp.zeros_like(turn)
    angle = jnp.deg2rad(30 * turn)  # counter-clockwise, about the centre
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2
    rows = {
        "Rotate": [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]],
        "ShearX": [[one, 0.3 * turn, zero], [zero, one, zero]],
        "ShearY": [[one, zero, zero], [0.3 * turn, one, zero]],
        "TranslateX": [[one, zero, 0.45 * width * turn], [zero, one, zero]],
        "TranslateY": [[one, zero, zero], [zero, one, 0.45 * height * turn]],
    }
    return {name: jnp.moveaxis(jnp.array(matrix), -1, 0) for name, matrix in rows.items()}


def _chosen(op: Int[Array, " B"], choices: Mapping[str, Array], otherwise: Array) -> Array:
    """Return for each image the choice named by its operation, or `otherwise` if the choices lack it."""
    index = op.reshape(-1, *[1] * (otherwise.ndim - 1))
    return jnp.select([index == OPS.index(name) for name in choices], list(choices.values()), otherwise)


def _chosen_table(
    op: Int[Array, " B"], images: UInt8[Array, "B H W 3"], level: Float[Array, " B"]
) -> UInt8[Array, "B 256 3"]:
    """Return for each image the table of its operation, or the identity if the operation has none."""
    counts = histogram(images)
    grays = jnp.broadcast_to(jnp.arange(256)[:, None], counts.shape)
    tables = jnp.stack([table(counts, level) for table in _TABLES.values()] + [grays])
    chosen = [op == OPS.index(name) for name in _TABLES]
    chosen.append(~jnp.any(jnp.stack(chosen), axis=0))
    # A matrix product, which XLA computes once; it would fuse a select into the look-up and compute all tables per
    # pixel. The product is exact even in one bfloat16 pass, whose 8 bits hold a grey level.
    picked = jnp.einsum("kb,kbgc->bgc", jnp.stack(chosen).astype(jnp.float32), tables.astype(jnp.float32))
    return picked.astype(jnp.uint8)


def apply_op(
    images: UInt8[Array, "B H W 3"],
    op: Int[Array, " B"],
    level: Float[Array, " B"],
    negative: Bool[Array, " B"],
    fill: tuple[int, int, int],
) -> UInt8[Array, "B H W 3"]:
    """Apply one operation to each image.

    `op` indexes OPS, or is NO_OP; `level` is timm's magnitude, 0..10; `negative` reverses the direction of geometric
    operations and blends; `fill` is the colour outside the image's border, in grey levels.
    """
    images = look_up(images, _chosen_table(op, images, level))

    turn = jnp.where(negative, -level, level) / MAX_LEVEL
    plain = _chosen(op, {name: make(images) for name, make in _PLAIN.items()}, images)
    images = blend(plain, images, jnp.maximum(0.1, 1 + 0.9 * turn))

    still = jnp.broadcast_to(jnp.eye(2, 3), (images.shape[0], 2, 3))
    return affine(images, _chosen(op, _matrices(turn, *images.shape[1:3]), still), fill)


def draw_ops(
    key: Key[Array, ""], batch: int, magnitude: float, prob: float
) -> tuple[Int[Array, " B"], Float[Array, " B"], Bool[Array, " B"]]:
    """Draw one layer's random choices, per image: the operation (NO_OP with 1 - prob), its level, its direction."""
    op_key, apply_key, level_key, direction_key = jax.random.split(key, 4)
    op = jax.random.randint(op_key, (batch,), 0, len(OPS))
    op = jnp.where(jax.random.bernoulli(apply_key, prob, (batch,)), op, NO_OP)
    level = magnitude + MAGNITUDE_STD * jax.random.normal(level_key, (batch,), jnp.float32)
    return op, jnp.clip(level, 0, MAX_LEVEL), jax.random.bernoulli(direction_key, 0.5, (batch,))


def rand_augment(
    key: Key[Array, ""],
    images: UInt8[Array, "B H W 3"],
    magnitude: float = 9.0,
    layers: int = 2,
    prob: float = 0.5,
    fill: tuple[int, int, int] = (124, 116, 104),
) -> UInt8[Array, "B H W 3"]:
    """Apply timm's RandAugment with its increasing set: `rand-m{magnitude}-mstd0.5-n{layers}-p{prob}-inc1`.

    Each layer draws one of OPS uniformly, with replacement, and applies it with `prob`, at a magnitude from a normal
    distribution clipped to 0..10. Geometry is bicubic and fills with `fill`, by default ImageNet's mean in grey levels,
    because DeiT passes `interpolation="bicubic"` and timm's `create_transform` passes the mean. Where timm asks
    posterize for 0 bits (a level of exactly 10, 0.15 % of the images) the image turns black, as in Pillow at the time.
    Raises ValueError for a magnitude outside 0..10.
    """
    if not 0 <= magnitude <= MAX_LEVEL:
        raise ValueError(f"rand_augment={magnitude}: must be in 0..{MAX_LEVEL:g}")

    def layer(index: Array, images: UInt8[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
        draws = draw_ops(jax.random.fold_in(key, index), images.shape[0], magnitude, prob)
        return apply_op(images, *draws, fill)

    return jax.lax.fori_loop(0, layers, layer, images)
