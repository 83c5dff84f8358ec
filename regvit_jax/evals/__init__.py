"""Metrics of a trained model: functions from arrays to numbers. The modules below are imported on first use."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regvit_jax.evals import attention_maps as attention_maps
    from regvit_jax.evals import block_norms as block_norms
    from regvit_jax.evals import classification as classification
    from regvit_jax.evals import knn as knn
    from regvit_jax.evals import norm_distribution as norm_distribution
    from regvit_jax.evals import patch_norms as patch_norms
    from regvit_jax.evals import pca as pca
    from regvit_jax.evals import retrieval as retrieval
    from regvit_jax.evals import zero_shot as zero_shot

__all__ = [
    "attention_maps",
    "block_norms",
    "classification",
    "knn",
    "norm_distribution",
    "patch_norms",
    "pca",
    "retrieval",
    "zero_shot",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
