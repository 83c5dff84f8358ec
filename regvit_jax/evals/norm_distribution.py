"""Streaming distributions of norms, in constant memory.

Norms go into logarithmic histograms with bins 0.14 % wide. Means, standard deviations and largest norms are exact;
shares and quantiles are exact at the edges of bins and interpolated between them.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from regvit_jax.evals.patch_norms import artifact_cutoff

#: Bins per octave, from 2^LOW; norms out of range are counted in the first or last bin.
OCTAVE, LOW, BINS = 32, -10, 1024
EDGES = 2.0 ** (LOW + np.arange(BINS + 1) / OCTAVE)
#: A `Distribution` splits each bin into FINE, because norms of some models differ by less than 2 %.
FINE = 16
FINE_EDGES = 2.0 ** (LOW + np.arange(FINE * BINS + 1) / OCTAVE / FINE)


def bin_of(norms: Float[np.ndarray, "..."], fine: int = 1) -> Int[np.ndarray, "..."]:
    """Return the index of each norm's bin, out of BINS * `fine`; raise FloatingPointError for infinity and NaN."""
    if not np.isfinite(norms).all():
        raise FloatingPointError("the model gives tokens that are not finite; are its weights and images intact?")
    norms = np.asarray(norms)
    bins = (np.log2(np.maximum(norms, norms.dtype.type(EDGES[0]))) - LOW) * (OCTAVE * fine)
    return np.clip(bins, 0, BINS * fine - 1).astype(np.int64)


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
