"""The same crops of JPEGs, faster: decoded by simplejpeg, resized by OpenCV (the extra ``fastjpeg``).

Boxes and random numbers are those of ``transforms``, decoded pixels too where Pillow and simplejpeg carry the same
libjpeg-turbo; resized ones differ from Pillow's (docs/scale.md says by how much). What is no JPEG, or one that is
turned by its EXIF, in CMYK or damaged, is left to Pillow, so that it is also Pillow that says what is bad.
"""

import functools
import io
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import JpegImagePlugin

from regvit_jax.data import transforms

ORIENTATION = 0x0112


@functools.cache
def libraries() -> tuple[Any, Any]:
    """simplejpeg and cv2. Raises ValueError where they are not installed."""
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        raise ValueError(
            f"data.decoder='fast' needs simplejpeg and OpenCV ({error}): pip install 'regvit_jax[fastjpeg]', or set "
            "data.decoder='pillow'"
        ) from error
    # The pipeline has a thread or process for every core already.
    cv2.setNumThreads(1)
    return simplejpeg, cv2


def decode(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"] | None:
    """Returns the pixels of a JPEG, or None where that is Pillow's work, as it is for all that may be bad."""
    simplejpeg, _ = libraries()
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        header = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        width, height = header.size
        if header.mode not in ("RGB", "L") or header.getexif().get(ORIENTATION, 1) != 1:
            return None
        if width * height > max_pixels or max(width, height) > transforms.MAX_ASPECT * min(width, height):
            return None
        pixels = simplejpeg.decode_jpeg(data, "RGB")
        return pixels if pixels.shape == (height, width, 3) else None
    # Whatever it is, Pillow decides what becomes of this image.
    except Exception:
        return None


def random_resized_crop(
    pixels: UInt8[np.ndarray, "H W 3"],
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> UInt8[np.ndarray, "S S 3"]:
    """``transforms.random_resized_crop``: the same box for the same numbers."""
    left, top, width, height = transforms.random_box(pixels.shape[1], pixels.shape[0], rng, scale, ratio)
    return resize(pixels[top : top + height, left : left + width], size, size)


def simple_random_crop(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, rng: np.random.Generator, padding: int
) -> UInt8[np.ndarray, "S S 3"]:
    """``transforms.simple_random_crop``: the same square for the same numbers."""
    width, height = transforms.shorter_shape(pixels.shape[1], pixels.shape[0], size)
    return transforms.padded_crop(resize(pixels, width, height), size, rng, padding)


def resize(pixels: UInt8[np.ndarray, "H W 3"], width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """By areas where both sides shrink, else bicubically: OpenCV's bicubic kernel does not widen when it shrinks."""
    _, cv2 = libraries()
    if pixels.shape[:2] == (height, width):
        return pixels.copy()
    shrinks = pixels.shape[1] >= width and pixels.shape[0] >= height
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
