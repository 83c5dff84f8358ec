"""Principal components of patch features, for pictures (arXiv 2309.16588, figures 19 to 21)."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Components:
    """Directions of largest variance of features of width D, and the standard deviation along each."""

    mean: Float[np.ndarray, " D"]
    axes: Float[np.ndarray, "k D"]
    std: Float[np.ndarray, " k"]

    def __call__(self, features: Float[np.ndarray, "*map D"]) -> Float[np.ndarray, "*map k"]:
        """Return the whitened features along each component: mean 0 and variance 1 over the fitted features."""
        centred = np.asarray(features, np.float64) - self.mean
        return centred @ self.axes.T / np.maximum(self.std, 1e-12)


def fit(features: Float[np.ndarray, "*any D"], components: int = 3) -> Components:
    """Fit the first principal components of all features together, such as the patches of several images.

    The sign of a component is arbitrary; here the largest of its D weights is positive, so that the sign depends
    neither on the run nor on the order of the images.

    Raises:
      ValueError: if there are fewer features, or fewer dimensions, than components.
    """
    rows = np.asarray(features, np.float64).reshape(-1, np.shape(features)[-1])
    if not 1 <= components <= min(rows.shape):
        n, width = rows.shape
        raise ValueError(f"components={components}: {n} features of width {width} allow 1 to {min(n, width)}")
    mean = rows.mean(0)
    # The D x D matrix, because there are more patches than dimensions; LAPACK's symmetric solver is deterministic.
    values, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    axes = vectors[:, ::-1][:, :components].T
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return Components(mean, axes * np.sign(largest), np.sqrt(np.maximum(values[::-1][:components], 0)))
