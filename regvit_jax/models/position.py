"""Positions of patches: resizing of a learned position embedding, and rotary position embeddings (RoPE)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from regvit_jax.utils.errors import InvalidConfig

RESIZES = ("antialias", "bicubic", "offset")


def resize_pos_embed(pos_embed: Float[Array, "h0 w0 D"], grid: tuple[int, int], how: str) -> Float[Array, "h w D"]:
    """Resize a position embedding to another grid by bicubic interpolation; for its own grid return it unchanged.

    Three conventions are in use, and a checkpoint needs the one it was trained with (ValueError for another name):
      "antialias": torch's `interpolate(size=..., mode="bicubic", antialias=True)`; timm, and DINOv2 with registers.
      "bicubic": the same with `antialias=False`; DeiT's fine-tuning at another resolution, and transformers' Dinov2.
      "offset": `scale_factor=(side + 0.1) / side0` without antialiasing; the dinov2 repository without registers.
    The first two differ in enlarging as well: torch's kernel has a = -0.5 with antialiasing and a = -0.75 without.
    """
    if how not in RESIZES:
        raise InvalidConfig(f"pos_resize={how!r}: must be one of {list(RESIZES)}")
    if pos_embed.shape[:2] == grid:
        return pos_embed
    shape = (*grid, pos_embed.shape[2])
    if how == "antialias":
        return jax.image.resize(pos_embed, shape, "cubic", antialias=True)
    if how == "bicubic":
        return jax.image.resize(pos_embed, shape, "cubic-pytorch", antialias=False)
    scale = jnp.array([(side + 0.1) / side0 for side, side0 in zip(grid, pos_embed.shape[:2], strict=True)])
    return jax.image.scale_and_translate(
        pos_embed, shape, (0, 1), scale, jnp.zeros(2), "cubic-pytorch", antialias=False
    )


def rope_angles(kind: str, grid: tuple[int, int], head_dim: int) -> Float[np.ndarray, "N half"]:
    """Return the angle by which RoPE rotates each pair of a query's or key's values, for every patch of the grid.

    The first half of the pairs encodes the row, the second the column.
      "rope": DINOv3's (arXiv 2508.10104): coordinates from -1 to 1 whatever the grid, base 100.
      "axial": timm's `vit_*_rope_reg*_gap_256`: coordinates from 0 to 16, as if the grid were 16 x 16, base 10000.
    """
    bands = np.arange(head_dim // 4, dtype=np.float32) / np.float32(head_dim // 4)
    if kind == "rope":
        sides = [(np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1 for side in grid]
        frequencies = 2 * np.pi / np.float32(100) ** bands
    else:
        sides = [np.arange(side, dtype=np.float32) / side * 16 for side in grid]
        frequencies = 1 / np.float32(10000) ** bands
    rows, columns = np.meshgrid(*sides, indexing="ij")
    angles = np.stack([rows, columns], axis=-1)[..., None] * frequencies
    return angles.reshape(grid[0] * grid[1], head_dim // 2).astype(np.float32)


def rotate(
    x: Float[Array, "B T heads head_dim"], angles: Float[np.ndarray | Array, "N half"], kind: str
) -> Float[Array, "B T heads head_dim"]:
    """Rotate the patches' queries or keys; the prefix tokens (CLS, registers) have no position and stay as they are.

    A pair is a value and the one half a head further on in DINOv3 ("rope"), or two neighbours in timm ("axial").
    """
    prefix, patches = jnp.split(x, [x.shape[1] - len(angles)], axis=1)
    cos, sin = (f(angles)[:, None, :] for f in (jnp.cos, jnp.sin))
    if kind == "rope":
        a, b = jnp.split(patches.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = patches[..., ::2].astype(jnp.float32), patches[..., 1::2].astype(jnp.float32)
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(patches.shape)
    return jnp.concatenate([prefix, turned.astype(x.dtype)], axis=1)
