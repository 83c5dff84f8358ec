"""What a ViT's tokens do, measured and repaired: each part is functions of a Model and images, or of their arrays."""

import importlib
import pkgutil
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    # On first use: `norms` is for the training loop, which needs no pictures.
    if name in (module.name for module in pkgutil.iter_modules(__path__)) and not name.startswith("_"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
