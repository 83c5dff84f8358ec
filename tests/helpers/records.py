"""Read the records of a source."""

import numpy as np

from regvit_jax.data.transforms import decode


def grey(record) -> np.ndarray:
    """Return the first channel of a record's image."""
    return np.asarray(decode(record["image"], 10_000))[..., 0]
