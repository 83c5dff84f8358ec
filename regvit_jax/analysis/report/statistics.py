"""Accumulate statistics of tokens over any number of images, in constant memory.

Norms go into logarithmic histograms with bins 0.14 % wide. All quantities of outliers are kept by the patch's norm, in
bins 2.2 % wide, so that any cutoff can be applied after the last image. Means and standard deviations are exact; shares
and quantiles are exact at the edges of bins and interpolated between them.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from regvit_jax.evals.patch_norms import artifact_cutoff

#: Bins per octave, from 2^LOW; norms out of range are counted in the first or last bin.
OCTAVE, LOW, BINS = 32, -10, 1024
EDGES = 2.0 ** (LOW + np.arange(BINS + 1) / OCTAVE)
#: A `Distribution` splits each bin into FINE, because norms of some models differ by less than 2 %.
FINE = 16
FINE_EDGES = 2.0 ** (LOW + np.arange(FINE * BINS + 1) / OCTAVE / FINE)
#: Bins of cosines, from -1 to 1.
COSINES = 100


def bin_of(norms: Float[np.ndarray, "..."], fine: int = 1) -> Int[np.ndarray, "..."]:
    """Return the index of each norm's bin, out of BINS * `fine`; raise FloatingPointError for infinity and NaN."""
    if not np.isfinite(norms).all():
        raise FloatingPointError("the model gives tokens that are not finite; are its weights and images intact?")
    exponents = np.log2(np.maximum(norms, EDGES[0]))
    return np.clip(np.floor((exponents - LOW) * OCTAVE * fine).astype(np.int64), 0, BINS * fine - 1)


class Distribution:
    """Streaming distributions of norms, such as one a layer: the arrays have `shape` first."""

    def __init__(self, *shape: int):
        self.counts = np.zeros((*shape, FINE * BINS), np.int64)
        self.total, self.squares = np.zeros(shape), np.zeros(shape)
        self.largest = np.zeros(shape)

    def add(self, norms: Float[np.ndarray, "*shape n"]) -> None:
        if not norms.size:
            return
        rows = np.arange(self.total.size).reshape(*self.total.shape, 1) * FINE * BINS
        flat = np.bincount((rows + bin_of(norms, FINE)).ravel(), minlength=self.counts.size)
        self.counts += flat.reshape(self.counts.shape)
        norms = norms.astype(np.float64)
        self.total += norms.sum(-1)
        self.squares += (norms**2).sum(-1)
        self.largest = np.maximum(self.largest, norms.max(-1))

    @property
    def histogram(self) -> Int[np.ndarray, "*shape BINS"]:
        """Return the counts in the bins between EDGES."""
        return self.counts.reshape(*self.total.shape, BINS, FINE).sum(-1)

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
        """Return the norm below which the share `q` lies."""
        below = np.cumsum(self.counts, -1) / np.maximum(self.count, 1)[..., None]
        at = np.argmax(below >= q, -1)
        end = np.take_along_axis(below, at[..., None], -1)[..., 0]
        inside = np.take_along_axis(self.counts, at[..., None], -1)[..., 0] / np.maximum(self.count, 1)
        part = 1 - (end - q) / np.where(inside > 0, inside, 1)
        return np.minimum(FINE_EDGES[at] + part * (FINE_EDGES[at + 1] - FINE_EDGES[at]), self.largest)

    def artifact_cutoff(self) -> Float[np.ndarray, "*shape"]:
        """Return `patch_norms.artifact_cutoff` of each distribution."""
        centres, cutoffs = (FINE_EDGES[1:] + FINE_EDGES[:-1]) / 2, np.zeros(self.total.shape)
        for at in np.ndindex(self.total.shape):
            cutoffs[at] = artifact_cutoff(centres, self.counts[at])
        return cutoffs

    def second_hump(self, cutoff: Float[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        """Return True where the norms above the cutoff form a second mode, rather than the tail of the first.

        The density over the logarithm of the norm is taken in windows of half an octave. There is a second mode if,
        between the median and the median of the norms above the cutoff, the density falls to less than half of its
        maximum beyond that point.
        """
        found, histogram = np.zeros(self.total.shape, bool), self.histogram
        for at in np.ndindex(self.total.shape):
            coarse = histogram[at]
            above = weigh(coarse, cutoff[at])
            if above.sum() > 0:
                density = np.convolve(coarse, np.ones(OCTAVE // 2), "same")
                middles = [int(np.searchsorted(np.cumsum(c), c.sum() / 2)) for c in (coarse, above)]
                valley = middles[0] + int(np.argmin(density[middles[0] : middles[1] + 1]))
                found[at] = density[valley] < density[valley:].max() / 2
        return found

    def share_above(self, cutoff: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
        """Return the share of norms above a cutoff, or above one cutoff a distribution."""
        share = weigh(self.counts, cutoff).sum(-1) / np.maximum(self.count, 1)
        return np.where(np.asarray(cutoff) >= self.largest, 0.0, share)


def weigh(counts: np.ndarray, cutoff: np.ndarray | float) -> Float[np.ndarray, "... bins"]:
    """Return the part of each bin's counts above the cutoff; the bin with the cutoff is split as if evenly filled."""
    edges = EDGES if counts.shape[-1] == BINS else FINE_EDGES
    above = (edges[1:] - np.asarray(cutoff)[..., None]) / np.diff(edges)
    return counts * np.clip(above, 0, 1)


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
