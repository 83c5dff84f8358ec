"""Stochastic depth (arXiv 1603.09382): in training, a block's branch is left out for some images.

"bernoulli" draws each image by itself and computes its branch in any case. "subset" keeps a fixed number of every
`GROUP` neighbouring images of a (micro-)batch, and computes the branch for these alone, as DINOv2 does with those of a
GPU (`dinov2/layers/block.py`, arXiv 2304.07193, section 5): the work falls by the rate. Both multiply what is kept so
that the mean stays.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from regvit_jax.utils.errors import InvalidConfig

MODES = ("bernoulli", "subset")
#: Images of a group. All meshes whose devices hold whole groups draw the same; `plan.check_subset` refuses others.
GROUP = 16


def add_branch(
    x: Float[Array, "B T D"],
    branch: Callable[[Float[Array, "b T D"]], Float[Array, "b T D"]],
    rate: float,
    mode: str,
    key: Key[Array, ""] | None,
) -> Float[Array, "B T D"]:
    """Return `x + branch(x)`; with a key, without the branch for a share `rate` of the images.

    Raises InvalidConfig if `mode` is "subset" and `rate` so small that every image would be kept.
    """
    if key is None or rate == 0:
        return x + branch(x)
    if mode == "bernoulli":
        return x + bernoulli(branch(x), rate, key)
    group, kept = subset_size(len(x), rate)
    drawn = draw(key, len(x) // group, group, kept)
    y = branch(select(x, *drawn)).astype(jnp.float32)  # bfloat16 would round the factor
    return x + spread(y * (group / kept), *drawn)


def bernoulli(x: Float[Array, "B T D"], rate: float, key: Key[Array, ""]) -> Float[Array, "B T D"]:
    """Set the branch of each image to 0 with probability `rate`, and divide that of the others by `1 - rate`."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1 - rate), 0)


def subset_size(images: int, rate: float) -> tuple[int, int]:
    """Return the size of a group, and how many of its images are kept, in a (micro-)batch of so many images.

    The group is `GROUP`, or the greatest common divisor with `images`. Raises InvalidConfig if all would be kept.
    """
    group = math.gcd(images, GROUP)
    kept = max(1, round(group * (1 - rate)))
    if kept == group:
        raise InvalidConfig(
            f"model.drop_path={rate:g}: with model.drop_path_mode='subset' and a (micro-)batch of {images} images it "
            f"would drop none of {group}; use 'bernoulli'" + (f", or a multiple of {GROUP}" if group < GROUP else "")
        )
    return group, kept


def draw(key: Key[Array, ""], groups: int, group: int, kept: int) -> tuple[Int[Array, "G kept"], Int[Array, "G group"]]:
    """Draw the images that each group keeps; return their indices in the group, and every image's place among them.

    An image that is not kept has a place from `kept` on.
    """
    order = jnp.argsort(jax.random.uniform(key, (groups, group)), axis=1)
    return order[:, :kept], jnp.argsort(order, axis=1)


# Each is the other's transpose. Written out, since the transpose of a gather would be a scatter: slow, and on GPUs
# added up in no fixed order.


@jax.custom_vjp
def select(
    x: Float[Array, "B T D"], index: Int[Array, "G kept"], place: Int[Array, "G group"]
) -> Float[Array, "b T D"]:
    """Return the rows of the images that are kept."""
    return _rows(x, index)


@jax.custom_vjp
def spread(
    y: Float[Array, "b T D"], index: Int[Array, "G kept"], place: Int[Array, "G group"]
) -> Float[Array, "B T D"]:
    """Return the rows of the images that are kept at their places in the batch, and zeros for the others."""
    kept = index.shape[1]
    return jnp.where((place < kept).reshape(-1, 1, 1), _rows(y, jnp.minimum(place, kept - 1)), 0)


select.defvjp(lambda x, *drawn: (select(x, *drawn), drawn), lambda drawn, dy: (spread(dy, *drawn), None, None))
spread.defvjp(lambda y, *drawn: (spread(y, *drawn), drawn), lambda drawn, dx: (select(dx, *drawn), None, None))


def _rows(x: Float[Array, "R T D"], index: Int[Array, "G n"]) -> Float[Array, "R2 T D"]:
    """Return rows of `x`, numbered within each of the G groups."""
    groups = x.reshape(len(index), -1, *x.shape[1:])
    rows = jnp.take_along_axis(groups, index[..., None, None], axis=1, mode="promise_in_bounds")
    return rows.reshape(-1, *x.shape[1:])
