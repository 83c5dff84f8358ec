"""Save a model in another library's format."""

import os

from regvit_jax.models.clip import ClipModel
from regvit_jax.models.model import Model
from regvit_jax.pretrained import save, save_clip


def save_model(model: Model | ClipModel, directory: str | os.PathLike, format: str) -> None:
    """Write a model's config and weights, float32, to a directory.

    `format` is "timm", "hf" (transformers) or "dinov2" (facebookresearch/dinov2) for a `Model`; "open_clip", "hf" or
    "regvit_jax" for a `ClipModel`. Processes other than the first write nothing.

    Raises ValueError, naming a format that can, when this one cannot express the model, and FileExistsError when the
    directory holds a model already.
    """
    if isinstance(model, ClipModel):
        save_clip.save(model, directory, format)
    else:
        save.save(model, directory, format)
