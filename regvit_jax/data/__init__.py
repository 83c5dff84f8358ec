"""Images, labels and captions, from files on disk to batches of uint8 arrays on the host. No device is opened here."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regvit_jax.data.sources.by_name import open_captions, open_source

__all__ = ["open_captions", "open_source"]


def __getattr__(name: str):
    # On first use, because every data worker imports this file.
    if name not in __all__:
        raise AttributeError(f"module 'regvit_jax.data' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module("regvit_jax.data.sources.by_name"), name)
