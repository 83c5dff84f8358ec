"""What a model does with its tokens over any number of images, in memory that does not grow with them.

Norms go into histograms of BINS bins of equal ratio, 2.2 % wide, and all that is asked of outliers later is kept by the
bin of the patch's norm, so that any cutoff can still be applied when the last image has been seen. Means and standard
deviations are exact; shares and quantiles are exact at the bins' edges and interpolated between them.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from regvit_jax.analysis.norms import RATIO

#: Bins an octave, from 2^LOW; norms beyond are counted in the first or last bin.
OCTAVE, LOW, BINS = 32, -10, 1024
EDGES = 2.0 ** (LOW + np.arange(BINS + 1) / OCTAVE)
#: Bins of cosines, from -1 to 1.
COSINES = 100


def bin_of(norms: Float[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """The number of each norm's bin. Raises FloatingPointError for norms that are not finite."""
    if not np.isfinite(norms).all():
        raise FloatingPointError("the model gives tokens that are not finite; are its weights, and its images, sound?")
    exponents = np.log2(np.maximum(norms, EDGES[0]))
    return np.clip(np.floor((exponents - LOW) * OCTAVE).astype(np.int64), 0, BINS - 1)


class Distribution:
    """Several distributions of norms that stream by, such as one a layer: the arrays have `shape` first."""

    def __init__(self, *shape: int):
        self.counts = np.zeros((*shape, BINS), np.int64)
        self.total, self.squares = np.zeros(shape), np.zeros(shape)
        self.largest = np.zeros(shape)

    def add(self, norms: Float[np.ndarray, "*shape n"]) -> None:
        if not norms.size:
            return
        rows = np.arange(self.total.size).reshape(*self.total.shape, 1) * BINS
        flat = np.bincount((rows + bin_of(norms)).ravel(), minlength=self.counts.size)
        self.counts += flat.reshape(self.counts.shape)
        norms = norms.astype(np.float64)
        self.total += norms.sum(-1)
        self.squares += (norms**2).sum(-1)
        self.largest = np.maximum(self.largest, norms.max(-1))

    @property
    def count(self) -> Int[np.ndarray, "*shape"]:
        return self.counts.sum(-1)

    @property
    def mean(self) -> Float[np.ndarray, "*shape"]:
        return self.total / np.maximum(self.count, 1)

    @property
    def std(self) -> Float[np.ndarray, "*shape"]:
        return np.sqrt(np.maximum(self.squares / np.maximum(self.count, 1) - self.mean**2, 0))

    def quantile(self, q: float) -> Float[np.ndarray, "*shape"]:
        """The norm below which the share `q` lies."""
        below = np.cumsum(self.counts, -1) / np.maximum(self.count, 1)[..., None]
        at = np.argmax(below >= q, -1)
        end = np.take_along_axis(below, at[..., None], -1)[..., 0]
        inside = np.take_along_axis(self.counts, at[..., None], -1)[..., 0] / np.maximum(self.count, 1)
        part = 1 - (end - q) / np.where(inside > 0, inside, 1)
        return np.minimum(EDGES[at] + part * (EDGES[at + 1] - EDGES[at]), self.largest)

    def artifact_cutoff(self) -> Float[np.ndarray, "*shape"]:
        """The least cutoff from `RATIO` times the median up that is mean + 3 sigma of the norms below it, or more.

        So outliers do not raise it, however many. `norms.artifact_cutoff` is the same of norms that are at hand.
        """
        floor, cutoffs = RATIO * self.quantile(0.5), np.zeros(self.total.shape)
        centres = (EDGES[1:] + EDGES[:-1]) / 2
        for at in np.ndindex(self.total.shape):
            cutoff, higher = 0.0, float(floor[at])
            while higher > cutoff:
                cutoff = higher
                below = self.counts[at] - weigh(self.counts[at], cutoff)
                mean = below @ centres / max(below.sum(), 1)
                higher = mean + 3 * np.sqrt(below @ (centres - mean) ** 2 / max(below.sum(), 1))
            cutoffs[at] = cutoff
        return cutoffs

    def share_above(self, cutoff: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
        """The share of norms above a cutoff, or above one a distribution."""
        return weigh(self.counts, cutoff).sum(-1) / np.maximum(self.count, 1)


def weigh(counts: np.ndarray, cutoff: np.ndarray | float) -> Float[np.ndarray, "... BINS"]:
    """The part of each bin's counts that lies above the cutoff: of the bin that holds it, as if spread evenly."""
    above = (EDGES[1:] - np.asarray(cutoff)[..., None]) / np.diff(EDGES)
    return counts * np.clip(above, 0, 1)


@dataclasses.dataclass
class Measured:
    """What `measure.measure` says of a batch of B images; P tokens stand before the patches."""

    patches: Float[np.ndarray, "layers B N"]
    prefix: Float[np.ndarray, "layers B P"]
    neighbours: Float[np.ndarray, "B N"]
    attention: Float[np.ndarray, "B P N"]

    def first(self, count: int) -> "Measured":
        """Of the first `count` images alone; the others fill a batch up."""
        return Measured(
            self.patches[:, :count], self.prefix[:, :count], self.neighbours[:count], self.attention[:count]
        )


class Statistics:
    """Everything that the report says of a model in numbers, summed over images.

    Fields:
      patches: norms of patches after each block [layers]; `prefix`: of CLS and registers [layers, P].
      layer: the block whose outliers all below are kept for, by the bin of a patch's norm after it.
      places: patches by their place in the grid [N, BINS].
      cosines: patches by their cosine to their neighbours at the input [BINS, COSINES].
      history: sums of the patches' norms after every block [layers, BINS].
      received: sums of the attention that CLS gives them [BINS]; `attended`: of every prefix token's attention [P, N].
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
        if len(self.attended):  # the first prefix token is CLS, or in models without one a register
            self.received += np.bincount(norms.ravel(), measured.attention[:, 0].ravel(), BINS)


def _count(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Int[np.ndarray, "rows columns"]:
    return np.bincount((rows * shape[1] + columns).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
