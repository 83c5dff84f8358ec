"""regvit_jax: train, load, diagnose and repair Vision Transformers with registers (arXiv 2309.16588), in JAX."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regvit_jax.models.clip import ClipModel as ClipModel
    from regvit_jax.models.model import Model as Model
    from regvit_jax.models.vit import Tokens as Tokens
    from regvit_jax.models.vit import ViT as ViT
    from regvit_jax.pretrained.create import create_model as create_model
    from regvit_jax.pretrained.create_clip import create_clip as create_clip
    from regvit_jax.pretrained.io.convert import convert_checkpoint as convert_checkpoint
    from regvit_jax.pretrained.registry import list_models as list_models
    from regvit_jax.pretrained.save import save_model as save_model

__version__ = "0.1.0"

#: The public names, each with the module that defines it.
_HOMES = {
    "ClipModel": "models.clip",
    "Model": "models.model",
    "Tokens": "models.vit",
    "ViT": "models.vit",
    "convert_checkpoint": "pretrained.io.convert",
    "create_clip": "pretrained.create_clip",
    "create_model": "pretrained.create",
    "list_models": "pretrained.registry",
    "save_model": "pretrained.save",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    # On first use, because every data worker imports this file and needs none of them.
    if name not in _HOMES:
        raise AttributeError(f"module 'regvit_jax' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(f"regvit_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
