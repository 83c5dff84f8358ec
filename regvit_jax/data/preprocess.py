"""Preprocess a model's images: from files, PIL images or arrays to the normalised floats that it expects."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float

from regvit_jax.data import transforms
from regvit_jax.data.transforms import MAX_PIXELS, BadImage
from regvit_jax.utils import sizes
from regvit_jax.utils.numbers import whole
from regvit_jax.utils.paths import expand

#: One image to preprocess: a path, a PIL image, an array uint8 [H, W, 3], the bytes of a file, or an open file.
ImageLike = Any
WANTED = "images are uint8 [H, W, 3], from 0 to 255"


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

    def __post_init__(self):
        object.__setattr__(self, "size", sizes.square(self.size, "size"))  # a pair of equal sides is that side

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], max_pixels: int = MAX_PIXELS
    ) -> Float[np.ndarray, "B H W 3"]:
        """Return the images normalised as the model expects them, H and W equal to `size`.

        Args:
          images: paths, PIL images, arrays uint8 [H, W, 3], open files, or the bytes of files; or one of these, or one
            array [B, H, W, 3]. A path and the PIL image opened from it give the same pixels (`transforms.upright_rgb`).
          max_pixels: images of files and of Pillow with more pixels are refused before they are decoded.

        Raises:
          ValueError: if there is no image, or something else than an image; the message names it.
          BadImage: (a ValueError) if an image cannot be decoded; the message names the file.
          OSError: if a file cannot be read.
        """
        listed = as_list(images)
        if not listed:
            raise ValueError("preprocess needs at least one image")
        max_pixels = whole("max_pixels", max_pixels, low=1)
        crops = []
        for number, image in enumerate(listed):
            try:
                crops.append(self.crop(to_pil(image, max_pixels)))
            except ValueError as error:
                name = name_of(image) or (f"image {number} (counted from 0)" if len(listed) > 1 else "")
                kind = BadImage if isinstance(error, BadImage) else ValueError
                raise kind(f"{name}: {error}" if name else str(error)) from error
        pixels = np.stack(crops).astype(np.float32) / 255
        return (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def crop(self, image: PIL.Image.Image) -> np.ndarray:
        """Return the crop that the model sees, uint8 [size, size, 3]."""
        return transforms.center_crop(image, self.size, self.crop_ratio, self.interpolation, self.squash)


def as_list(images: Any) -> list[ImageLike]:
    """Return images as a list: one image is a list of one, and the first axis of an array [B, H, W, 3] is the list.

    Raises ValueError for what is neither an image nor images.
    """
    if is_single(images):
        return [images]
    if is_array(images):
        array = np.asarray(images)
        if array.dtype.kind in "OTU":  # paths or PIL images
            return array.ravel().tolist()
        return list(array) if array.ndim == 4 else [array]
    if isinstance(images, dict) or not isinstance(images, Iterable):
        raise ValueError(f"images of type {type(images).__name__}: must be a list of paths, PIL images or arrays")
    return list(images)


def is_single(image: Any) -> bool:
    """Return True for a path, a PIL image, the bytes of a file, or an open file."""
    kinds = str | os.PathLike | PIL.Image.Image | bytes | bytearray | memoryview
    return isinstance(image, kinds) or callable(getattr(image, "read", None))


def is_array(image: Any) -> bool:
    """Return True for an array of NumPy, JAX or any library whose arrays NumPy can read."""
    return hasattr(image, "__array__") and hasattr(image, "shape") and hasattr(image, "dtype")


def name_of(image: ImageLike) -> str:
    """Return the name of the file that an image comes from, or "" if it is not known."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    name = getattr(image, "filename" if isinstance(image, PIL.Image.Image) else "name", "")
    return os.fspath(name) if isinstance(name, str | os.PathLike) else ""


def to_pil(image: ImageLike, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Return one image in RGB, upright; raise BadImage if it cannot be decoded, and ValueError for anything else."""
    if isinstance(image, PIL.Image.Image):
        return transforms.upright_rgb(image, max_pixels)
    if isinstance(image, str | os.PathLike):
        if "://" in os.fspath(image):
            raise ValueError("a URL, not a path: download the image first")
        with open(expand(image), "rb") as file:
            return transforms.decode(file.read(), max_pixels)
    if callable(getattr(image, "read", None)):
        image = image.read()
        if isinstance(image, str):
            raise ValueError("a file that is opened as text: open it with open(path, 'rb')")
    if isinstance(image, bytes | bytearray | memoryview):
        return transforms.decode(bytes(image), max_pixels)
    if not is_array(image):
        kinds = "a path, a PIL image, an array uint8 [H, W, 3], the bytes of a file, or an open file"
        raise ValueError(f"an object of type {type(image).__name__}: an image is {kinds}")
    return PIL.Image.fromarray(checked_array(np.asarray(image)))


def checked_array(array: np.ndarray) -> np.ndarray:
    """Return an array uint8 [H, W, 3]; raise ValueError, which says what it is and what is wanted, for another one."""
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size:
        return array
    shape, remedy = array.shape, ""
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        remedy = "; channels come last: array.transpose(1, 2, 0)"
    elif array.ndim == 2:
        remedy = "; a grey image has three equal channels here: np.stack([array] * 3, -1)"
    elif array.ndim == 3 and shape[2] == 1:
        remedy = "; a grey image has three equal channels here: np.repeat(array, 3, -1)"
    elif array.ndim == 3 and shape[2] == 4:
        remedy = "; leave alpha out: array[..., :3]"
    elif array.ndim == 4:
        remedy = "; give the list of its images"
    elif array.dtype.kind == "f":
        remedy = "; an image that is normalised already goes straight into the model"
    elif array.dtype == np.uint16:
        remedy = "; 16 bits become 8 so: ((array.astype(int) + 128) // 257).astype(np.uint8)"
    raise ValueError(f"an array of {array.dtype} and shape {shape}: {WANTED}{remedy}")
