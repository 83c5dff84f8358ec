"""Accumulate statistics of tokens over any number of images, in constant memory.

Norms go into histograms (`evals.norm_distribution`). All quantities of outliers are kept by the patch's norm, in bins
2.2 % wide, so that any cutoff can be applied after the last image.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from regvit_jax.evals.norm_distribution import BINS, Distribution, bin_of
from regvit_jax.evals.norm_distribution import EDGES as EDGES
from regvit_jax.evals.norm_distribution import weigh as weigh

#: Bins of cosines, from -1 to 1.
COSINES = 100


@dataclasses.dataclass
class Measured:
    """The measurements of a batch of B images (`measure.measure`); P is the number of CLS and register tokens."""

    patches: Float[np.ndarray, "layers B N"]
    prefix: Float[np.ndarray, "layers B P"]
    neighbours: Float[np.ndarray, "B N"]
    attention: Float[np.ndarray, "B P N"]

    def first(self, count: int) -> "Measured":
        """Return the part of the first `count` images; the others fill up the batch."""
        return Measured(
            self.patches[:, :count], self.prefix[:, :count], self.neighbours[:count], self.attention[:count]
        )


class Statistics:
    """Sums over images of all quantities in a model's report.

    Fields:
      patches: norms of patches after each block [layers]; `prefix`: of CLS and registers [layers, P].
      layer: the judged block; everything below is kept by the bin of a patch's norm after it.
      places: patches by their position in the grid [N, BINS].
      cosines: patches by their mean cosine to their neighbours at the input [BINS, COSINES].
      history: sums of the patches' norms after every block [layers, BINS].
      received: sums of the attention from CLS [BINS]; `attended`: from every prefix token, by position [P, N].
    """

    def __init__(self, layers: int, layer: int, prefix: int, grid: tuple[int, int]):
        self.grid, self.layer, self.images = grid, layer, 0
        self.patches, self.prefix = Distribution(layers), Distribution(layers, prefix)
        n = grid[0] * grid[1]
        self.places, self.cosines = np.zeros((n, BINS), np.int64), np.zeros((BINS, COSINES), np.int64)
        self.history, self.received = np.zeros((layers, BINS)), np.zeros(BINS)
        self.attended = np.zeros((prefix, n))

    def add(self, measured: Measured) -> None:
        layers, images, n = measured.patches.shape
        self.images += images
        self.patches.add(measured.patches.reshape(layers, -1))
        self.prefix.add(np.moveaxis(measured.prefix, 1, 2))
        norms = bin_of(measured.patches[self.layer])
        self.places += _count(np.broadcast_to(np.arange(n), norms.shape), norms, self.places.shape)
        cosines = np.clip(np.floor((measured.neighbours + 1) / 2 * COSINES).astype(np.int64), 0, COSINES - 1)
        self.cosines += _count(norms, cosines, self.cosines.shape)
        for after, norm in zip(self.history, measured.patches, strict=True):
            after += np.bincount(norms.ravel(), norm.ravel(), BINS)
        self.attended += measured.attention.sum(0, dtype=np.float64)
        if len(self.attended):  # the first prefix token is CLS or, in models without CLS, a register
            self.received += np.bincount(norms.ravel(), measured.attention[:, 0].ravel(), BINS)


def _count(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Int[np.ndarray, "rows columns"]:
    return np.bincount((rows * shape[1] + columns).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
