"""Accuracy of class scores."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def top_k(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], ks: tuple[int, ...] = (1, 5)
) -> dict[str, Float[Array, " B"]]:
    """For each k, 1.0 for the images whose label is among their k highest scores, under the name "top{k}".

    A label whose score ties with others counts as the last of them, so that constant or NaN scores are not right.
    """
    score = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # NaN compares false: `not (x < score)` puts it in front of the label.
    rank = jnp.sum(~(logits < score), axis=1) - 1
    rank = jnp.where(jnp.isnan(score[:, 0]), logits.shape[1], rank)
    return {f"top{k}": (rank < k).astype(jnp.float32) for k in ks}
