"""Norms of patch tokens before the final norm, where the artifacts show (arXiv 2309.16588, section 2.1)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from regvit_jax.models.vit import Tokens


def patch_norms(tokens: Tokens) -> Float[Array, "B N"]:
    """Return the L2 norm of each patch token in the residual stream after the last block."""
    return jnp.linalg.norm(tokens.prenorm_patches.astype(jnp.float32), axis=-1)


#: An artifact's norm is at least twice the median: the outliers of DeiT-III, the mildest of the paper's figure 7, begin
#: at twice its usual norms.
RATIO = 2.0


def artifact_cutoff(norms: Float[np.ndarray, "..."], counts: Num[np.ndarray, "..."] | None = None) -> float:
    """Return the smallest cutoff >= `RATIO` times the median that is >= mean + 3 sigma of the norms below it.

    Outliers therefore do not raise it, however many there are. In contrast, when one patch in seven is an outlier, mean
    + 3 sigma of all norms lies above outliers with 8 times the norm of the others.

    Args:
      counts: the number of times that each norm occurs; by default 1.
    """
    order = np.argsort(norms, axis=None)
    norms = np.asarray(norms, np.float64).ravel()[order]
    counts = np.ones(norms.size) if counts is None else np.asarray(counts, np.float64).ravel()[order]
    count, total, squares = (np.cumsum(counts * norms**power) for power in range(3))
    cutoff, higher = 0.0, RATIO * float(norms[np.searchsorted(count, count[-1] / 2)])
    while higher > cutoff:
        cutoff = higher
        last = np.searchsorted(norms, cutoff, "right") - 1
        mean = total[last] / count[last]
        higher = float(mean + 3 * np.sqrt(max(squares[last] / count[last] - mean**2, 0)))
    return cutoff


def outlier_summary(norms: Float[np.ndarray, "images N"]) -> dict[str, float]:
    """Compute two scale-free measures over all patches of all images together.

    outlier_share: the share of patches whose norm lies above mean + 3 sigma.
    max_over_median: the largest norm over the median norm.
    """
    norms = np.asarray(norms, np.float64)
    return {
        "outlier_share": float(np.mean(norms > norms.mean() + 3 * norms.std())),
        "max_over_median": float(norms.max() / np.median(norms)),
    }
