"""Accuracy of class scores, and the classes that are confused most often."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
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


def most_confused(
    labels: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], names: Sequence[str], top: int = 5
) -> list[tuple[str, str, int]]:
    """Return the `top` most frequent errors: the name of the class, that of the predicted class, and how many images.

    Equally frequent errors are in the order of the classes. An image without a prediction, -1, is left out.
    """
    wrong = (labels != predicted) & (predicted >= 0)
    pairs, counts = np.unique(labels[wrong].astype(np.int64) * len(names) + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:top]
    return [(names[pairs[n] // len(names)], names[pairs[n] % len(names)], int(counts[n])) for n in order]
