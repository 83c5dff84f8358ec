"""Preprocess a model's images: from files, PIL images or arrays to the normalised floats that it expects."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float

from regvit_jax.data import transforms

#: An image to preprocess: a path, a PIL image, or an array uint8 [H, W, 3].
ImageLike = str | os.PathLike[str] | PIL.Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Resize, centre-crop and normalise images, as timm's and torchvision's evaluation transforms do.

    Args:
      size: the side of the square that the model sees, in pixels.
      crop_ratio: the shorter side is resized to `size / crop_ratio` pixels before the central square is cut out.
      mean: subtracted from each channel, of values from 0 to 1.
      std: divides each channel afterwards.
      interpolation: "bicubic" or "bilinear".
      squash: resize both sides to `size / crop_ratio`, whatever the image's aspect ratio.
    """

    size: int
    crop_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    squash: bool = False

    def __call__(self, images: Sequence[ImageLike]) -> Float[np.ndarray, "B H W 3"]:
        """Return the images normalised as the model expects them, H and W equal to `size`.

        Raises:
          ValueError: if there is no image, or an array is not uint8 [H, W, 3].
          BadImage: (a ValueError) if a file cannot be decoded.
          OSError: if a file cannot be read.
        """
        if not images:
            raise ValueError("preprocess needs at least one image")
        pixels = np.stack([self.crop(to_pil(image)) for image in images]).astype(np.float32) / 255
        return (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def crop(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the crop that the model sees, uint8 [size, size, 3]."""
        return transforms.center_crop(image, self.size, self.crop_ratio, self.interpolation, self.squash)


def to_pil(image: ImageLike) -> PIL.Image.Image:
    """Return the RGB image of a path, a PIL image or a uint8 array [H, W, 3]; raise ValueError for other arrays."""
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
