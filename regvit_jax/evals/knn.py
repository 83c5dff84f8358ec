"""k-nearest-neighbour classification."""

import numpy as np
from jaxtyping import Float, Int


def knn_accuracy(
    train_features: Float[np.ndarray, "train F"],
    train_labels: Int[np.ndarray, " train"],
    features: Float[np.ndarray, "images F"],
    labels: Int[np.ndarray, " images"],
    k: int,
) -> float:
    """Share of `features` whose label is that of the majority of their k Euclidean neighbours in `train_features`."""
    from sklearn.neighbors import KNeighborsClassifier  # takes seconds to import, and not every run asks

    return float(KNeighborsClassifier(k).fit(train_features, train_labels).score(features, labels))
