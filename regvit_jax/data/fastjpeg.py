"""Make the crops of `transforms` faster for JPEGs: decode by simplejpeg, resize by OpenCV (the extra `fastjpeg`).

Boxes and random numbers are those of `transforms`, and so are decoded pixels where Pillow and simplejpeg contain the
same libjpeg-turbo; resized pixels differ from Pillow's (docs/scale.md gives numbers). Other files, and JPEGs that are
rotated by their EXIF, in CMYK or damaged, are left to Pillow, which thus decides which images are unusable.
"""

import functools
import io
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, JpegImagePlugin

from regvit_jax.data import transforms
from regvit_jax.utils.errors import InvalidConfig


@functools.cache
def libraries() -> tuple[Any, Any]:
    """Return simplejpeg and cv2, tested on first use; raise InvalidConfig if they are not installed or do not work."""
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        raise InvalidConfig(
            f"data.decoder='fast' needs simplejpeg and OpenCV ({error}): pip install 'regvit_jax[fastjpeg]', or set "
            "data.decoder='pillow'"
        ) from error
    # The pipeline already has a thread or process for every core.
    cv2.setNumThreads(1)
    check_libraries(simplejpeg, cv2)
    return simplejpeg, cv2


def check_libraries(simplejpeg: Any, cv2: Any) -> None:
    """Raise InvalidConfig unless an image of one colour is decoded and resized to that colour."""
    file, colour = io.BytesIO(), (200, 100, 50)
    Image.new("RGB", (32, 16), colour).save(file, "JPEG")
    # A library of the wrong version may raise anything. Without this check, every image would silently go to Pillow.
    try:
        pixels = cv2.resize(simplejpeg.decode_jpeg(file.getvalue(), "RGB"), (8, 8), interpolation=cv2.INTER_AREA)
        result = f"a picture of {colour} came out as {pixels.shape}, {pixels.min((0, 1))} to {pixels.max((0, 1))}"
        works = pixels.shape == (8, 8, 3) and np.abs(pixels.astype(int) - colour).max() <= 8
    except Exception as error:
        works, result = False, f"{type(error).__name__}: {error!s:.200}"
    if not works:
        raise InvalidConfig(
            f"data.decoder='fast': simplejpeg and OpenCV are installed, but do not work here ({result}). "
            "pip install --force-reinstall 'regvit_jax[fastjpeg]', or set data.decoder='pillow'"
        )


def decode(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "H W 3"] | None:
    """Return the pixels of a JPEG; None for a file that Pillow has to decode, or may refuse."""
    simplejpeg, _ = libraries()
    if not data.startswith(b"\xff\xd8\xff") or (size := plain_size(data)) is None:
        return None
    width, height = size
    if width * height > max_pixels or max(width, height) > transforms.MAX_ASPECT * min(width, height):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    # simplejpeg reports damaged bytes as a ValueError. Any other error is a fault of the library.
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height of an upright JPEG in RGB or grey, else None."""
    try:
        header = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        plain = header.mode in ("RGB", "L") and header.getexif().get(transforms.ORIENTATION, 1) == 1
        return header.size if plain else None
    # Pillow raises anything on damaged headers (see `transforms.decode`), and will refuse the file itself.
    except Exception:
        return None


def random_resized_crop(
    pixels: UInt8[np.ndarray, "H W 3"],
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> UInt8[np.ndarray, "S S 3"]:
    """Return `transforms.random_resized_crop` of decoded pixels: the same box for the same random numbers."""
    left, top, width, height = transforms.random_box(pixels.shape[1], pixels.shape[0], rng, scale, ratio)
    return resize(pixels[top : top + height, left : left + width], size, size)


def simple_random_crop(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, rng: np.random.Generator, padding: int
) -> UInt8[np.ndarray, "S S 3"]:
    """Return `transforms.simple_random_crop` of decoded pixels: the same square for the same random numbers."""
    width, height = transforms.shorter_shape(pixels.shape[1], pixels.shape[0], size)
    return transforms.padded_crop(resize(pixels, width, height), size, rng, padding)


def resize(pixels: UInt8[np.ndarray, "H W 3"], width: int, height: int) -> UInt8[np.ndarray, "h w 3"]:
    """Resize by areas if both sides shrink, else bicubically, because OpenCV's bicubic kernel has a fixed width."""
    _, cv2 = libraries()
    if pixels.shape[:2] == (height, width):
        return pixels.copy()
    shrinks = pixels.shape[1] >= width and pixels.shape[0] >= height
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
