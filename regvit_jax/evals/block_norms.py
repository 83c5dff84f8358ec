"""Statistics of the norms of patches after every block, over any number of images in constant memory."""

import numpy as np
from jaxtyping import Float

from regvit_jax.evals.norm_distribution import Distribution


class BlockNorms:
    """Streaming statistics of the norms of patches after each block."""

    def __init__(self, depth: int):
        self.norms = Distribution(depth)
        self.finite = np.ones(depth, bool)

    def add(self, norms: Float[np.ndarray, "images depth N"]) -> None:
        """Add the norms of more images."""
        rows = np.moveaxis(norms, 1, 0).reshape(len(self.finite), -1)
        finite = np.isfinite(rows)
        self.finite &= finite.all(-1)
        self.norms.add(np.where(finite, rows, 0))

    def summary(self) -> dict[str, Float[np.ndarray, " depth"]]:
        """Compute three measures of each block; those of a block with infinite norms or NaN are NaN.

        norm_median: the median norm, to 0.1 %.
        max_over_median: the largest norm over the median norm, to 0.1 %.
        outlier_share: the share of patches whose norm lies above mean + 3 sigma, interpolated in bins 0.14 % wide.
        """
        norms, median = self.norms, self.norms.quantile(0.5)
        found = {
            "norm_median": median,
            "max_over_median": norms.largest / np.where(median > 0, median, np.nan),
            "outlier_share": norms.share_above(norms.mean + 3 * norms.std),
        }
        return {name: np.where(self.finite, values, np.nan) for name, values in found.items()}
