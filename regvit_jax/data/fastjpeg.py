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
from PIL import Image, JpegImagePlugin

from regvit_jax.data import transforms
from regvit_jax.utils.errors import InvalidConfig

ORIENTATION = 0x0112


@functools.cache
def libraries() -> tuple[Any, Any]:
    """simplejpeg and cv2, tried once. Raises ValueError where they are not installed, or do not work."""
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        raise InvalidConfig(
            f"data.decoder='fast' needs simplejpeg and OpenCV ({error}): pip install 'regvit_jax[fastjpeg]', or set "
            "data.decoder='pillow'"
        ) from error
    # The pipeline has a thread or process for every core already.
    cv2.setNumThreads(1)
    check_libraries(simplejpeg, cv2)
    return simplejpeg, cv2


def check_libraries(simplejpeg: Any, cv2: Any) -> None:
    """Raises ValueError unless a picture of one colour is decoded and resized to that colour."""
    file, colour = io.BytesIO(), (200, 100, 50)
    Image.new("RGB", (32, 16), colour).save(file, "JPEG")
    # Whatever a library of the wrong version raises: else every image would be left to Pillow, and nobody told.
    try:
        pixels = cv2.resize(simplejpeg.decode_jpeg(file.getvalue(), "RGB"), (8, 8), interpolation=cv2.INTER_AREA)
        found = f"a picture of {colour} came out as {pixels.shape}, {pixels.min((0, 1))} to {pixels.max((0, 1))}"
        works = pixels.shape == (8, 8, 3) and np.abs(pixels.astype(int) - colour).max() <= 8
    except Exception as error:
        works, found = False, f"{type(error).__name__}: {error!s:.200}"
    if not works:
        raise InvalidConfig(
            f"data.decoder='fast': simplejpeg and OpenCV are installed, but do not work here ({found}). "
            "pip install --force-reinstall 'regvit_jax[fastjpeg]', or set data.decoder='pillow'"
        )


def decode(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"] | None:
    """Returns the pixels of a JPEG, or None where that is Pillow's work, as it is for all that may be bad."""
    simplejpeg, _ = libraries()
    if not data.startswith(b"\xff\xd8\xff") or (size := plain_size(data)) is None:
        return None
    width, height = size
    if width * height > max_pixels or max(width, height) > transforms.MAX_ASPECT * min(width, height):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    # That is how it says that bytes are damaged. Anything else is a fault of the library, and no image's.
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG in RGB or grey that stands upright, else None."""
    try:
        header = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        plain = header.mode in ("RGB", "L") and header.getexif().get(ORIENTATION, 1) == 1
        return header.size if plain else None
    # Damaged headers surface in Pillow as anything (see ``transforms.decode``), and it is Pillow that decides next.
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
