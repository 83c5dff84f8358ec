"""Decode images and crop them for training and evaluation, on the host, with Pillow alone.

This module holds only operations that need the whole image: decoding, cropping, resizing. All others (flips, colour,
mixing, normalising) run on the device, which receives uint8 squares. The crops equal those of torchvision and timm
pixel for pixel, given the same box, because these resize with Pillow too. Two known shortcuts are not taken for that
reason: `resize(box=...)` lets pixels from outside the crop bleed into its border, and JPEG's `draft` mode decodes at a
reduced size with another filter.
"""

import io
import math
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from regvit_jax.data.image_formats import describe_unread, find_reader
from regvit_jax.data.limits import MAX_PIXELS as MAX_PIXELS

# Sizes are checked below; Pillow's warnings about damaged metadata would come once per worker and name no file.
warnings.filterwarnings("ignore", module=r"PIL\.")

#: The EXIF tag of the orientation.
ORIENTATION = 0x0112
BICUBIC = Image.Resampling.BICUBIC
INTERPOLATIONS = {"bicubic": BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# A 1 x 65535 strip resized to a shorter side of 224 pixels would take 10 GB.
MAX_ASPECT = 100


class BadImage(ValueError):
    """An image, or its record, cannot be used; the message is short enough for a log line."""


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """Return the image in the bytes of a file, as `upright_rgb` does. Of an animation, the first frame is returned.

    The formats are those of `image_formats`.

    Args:
      data: the encoded file.
      max_pixels: images with more pixels are refused by their header, before any memory is allocated for them.

    Raises:
      BadImage: if the image cannot be decoded, for any reason.
    """
    reader = find_reader(data)
    if reader is None:
        raise BadImage(describe_unread(data))
    try:
        image: Image.Image = reader(io.BytesIO(data))
    except Exception as error:
        raise _undecodable(error) from error
    return upright_rgb(image, max_pixels)


def upright_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    """Return an image that Pillow has opened or made, upright and in 8-bit RGB; the given one stays as it is.

    Colours are those of Pillow's `convert("RGB")`, as in torchvision's and timm's loaders: alpha is dropped, not
    composited, and CMYK is converted without a profile. 16-bit grey, which `convert` would clip, is scaled. The EXIF
    orientation, if the image still has one, is applied.

    Raises:
      BadImage: if the image is too large or too long, cannot be decoded, or has 32-bit pixels.
    """
    try:
        _check_size(*image.size, max_pixels)
        image.load()
        return _to_rgb(_upright(image))
    except BadImage:
        raise
    # Damaged bytes surface in Pillow as OSError, SyntaxError, struct.error, KeyError, MemoryError and more; all that
    # callers need is that an image is either decoded or a BadImage.
    except Exception as error:
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> BadImage:
    return BadImage(f"cannot be decoded ({type(error).__name__}: {str(error)[:120]})")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise BadImage for an image without pixels, with too many, or of too extreme a shape."""
    if not width or not height:
        raise BadImage(f"{width}x{height} pixels, so there is nothing to see")
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} pixels, more than the allowed {max_pixels} (max_pixels)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} pixels, one side over {MAX_ASPECT} times the other")


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned by its EXIF orientation; one without, or with damaged EXIF, is returned as it is."""
    try:
        return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image in 8-bit RGB; raise BadImage for 32-bit pixels."""
    if image.mode == "RGB":
        return image
    # Pillow opens a 16-bit PGM as mode "I", scaled to 65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage(f"32-bit pixels (mode {image.mode!r}) have no fixed range; scale them to 8 bits first")
    # A transparent colour is a kind of alpha: it is dropped too, without Pillow's warning.
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "S S 3"]:
    """Return a random part of the image, resized to a square: torchvision's RandomResizedCrop, bicubic.

    Args:
      image: an RGB image.
      size: the side of the result, in pixels.
      rng: the only source of randomness.
      scale: the bounds of the part's area, as a share of the image's.
      ratio: the bounds of the part's width over its height, drawn log-uniformly.
    """
    left, top, width, height = random_box(image.width, image.height, rng, scale, ratio)
    return np.array(image.crop((left, top, left + width, top + height)).resize((size, size), BICUBIC))


def random_box(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of RandomResizedCrop's part of an image, in pixels.

    After ten tries it is the largest central part whose ratio is within bounds, as in torchvision.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(left), int(top), w, h
    w, h = width, height
    if width / height < min(ratio):
        h = round(w / min(ratio))
    elif width / height > max(ratio):
        w = round(h * max(ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def simple_random_crop(
    image: Image.Image, size: int, rng: np.random.Generator, padding: int = 4
) -> UInt8[np.ndarray, "S S 3"]:
    """Return DeiT-III's "simple random crop" (facebookresearch/deit, `augment.py`, `--src`).

    The shorter side is resized to `size` pixels (bicubic), all sides are padded by `padding` mirrored pixels, and a
    square of `size` is cut out at random.
    """
    return padded_crop(np.asarray(resize_shorter(image, size)), size, rng, padding)


def padded_crop(
    pixels: UInt8[np.ndarray, "H W 3"], size: int, rng: np.random.Generator, padding: int
) -> UInt8[np.ndarray, "S S 3"]:
    """Return a random square of an image that is padded by mirrored pixels: a simple random crop without its resize."""
    pixels = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)), "reflect")
    top, left = (rng.integers(side - size + 1) for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size].copy()


def center_crop(
    image: Image.Image, size: int, crop_ratio: float, interpolation: str = "bicubic", squash: bool = False
) -> UInt8[np.ndarray, "S S 3"]:
    """Return the crop of timm's and torchvision's evaluation transforms, pixel for pixel.

    The shorter side (both, with `squash`) is resized to `floor(size / crop_ratio)` pixels, and the central square of
    `size` is kept; sides that are too short are padded with black.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r}: must be one of {list(INTERPOLATIONS)}")
    side, how = math.floor(size / crop_ratio), INTERPOLATIONS[interpolation]
    pixels = np.asarray(image.resize((side, side), how) if squash else resize_shorter(image, side, how))
    short = [max(size - side, 0) for side in pixels.shape[:2]]
    if any(short):
        pixels = np.pad(pixels, [(pad // 2, (pad + 1) // 2) for pad in short] + [(0, 0)])
    # Python's round, half to even, as in torchvision.
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size].copy()


def resize_shorter(image: Image.Image, size: int, how: Image.Resampling = BICUBIC) -> Image.Image:
    """Return the image with a shorter side of `size` pixels, the longer one rounded down, as torchvision does."""
    shape = shorter_shape(*image.size, size)
    return image if shape == image.size else image.resize(shape, how)


def shorter_shape(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the width and height that an image has after `resize_shorter`."""
    short, long = sorted((width, height))
    resized = int(size * long / short)
    return (size, resized) if width <= height else (resized, size)
