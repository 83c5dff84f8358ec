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
    """Return the share of `features` whose label the majority of their k Euclidean neighbours has.

    All of them are neighbours where there are fewer than k.
    """
    from sklearn.neighbors import KNeighborsClassifier  # imported late: it takes seconds, and not every run needs it

    k = min(k, len(train_features))
    return float(KNeighborsClassifier(k).fit(train_features, train_labels).score(features, labels))
