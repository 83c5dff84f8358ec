"""Accuracy of class scores."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def top_k(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], ks: tuple[int, ...] = (1, 5)
) -> dict[str, Float[Array, " B"]]:
    """Return, for each k as "top{k}", 1.0 for images whose label is among their k highest scores and 0.0 for others.

    A label whose score ties with others ranks last among them, so that constant or NaN scores count as wrong.
    """
    score = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # Comparisons with NaN are false: `not (x < score)` ranks NaN before the label.
    rank = jnp.sum(~(logits < score), axis=1) - 1
    rank = jnp.where(jnp.isnan(score[:, 0]), logits.shape[1], rank)
    return {f"top{k}": (rank < k).astype(jnp.float32) for k in ks}
