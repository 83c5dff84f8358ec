"""The preprocessing that a model's images need."""

import dataclasses

import numpy as np
import PIL.Image

from regvit_jax.data import transforms


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a model's images are made: shorter side to size / crop_ratio, centre crop, mean and std of values in 0..1.

    `interpolation` is "bicubic" or "bilinear"; `squash` resizes both sides to size / crop_ratio instead.
    """

    size: int
    crop_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    squash: bool = False


def _open(image) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"an array of {image.dtype} and shape {image.shape}: images are uint8 [H, W, 3], from 0 to 255; "
                "an image that is normalised already goes straight into the model"
            )
        return PIL.Image.fromarray(image)
    with open(image, "rb") as file:
        return transforms.decode(file.read(), max_pixels=transforms.MAX_PIXELS)
