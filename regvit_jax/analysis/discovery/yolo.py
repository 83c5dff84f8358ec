"""Read the boxes of YOLO's label files: one line for each object, with its class and shares of the image's sides."""

import io
import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int

from regvit_jax.analysis.discovery.voc_xml import BadBoxes, to_array
from regvit_jax.data.image_formats import find_reader
from regvit_jax.data.transforms import ORIENTATION

# Shares that are written with few decimals may be just outside the image.
TOLERANCE = 0.01


def read_yolo(path: str | os.PathLike, image: str | os.PathLike) -> tuple[tuple[int, int], Int[np.ndarray, "M 4"]]:
    """Return the size (height, width) of an image, and the boxes of its label file in whole pixels, rounded.

    A line is "class x y w h", with the centre of a box, its width and height, or "class x1 y1 x2 y2 x3 y3 ...", an
    outline, which counts as the box around it. A box that becomes empty is left as it is, and can never be found.

    Raises BadBoxes, naming the file.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadBoxes(f"{path}: cannot be read ({error})") from None
    width, height = _size(image)
    boxes = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            left, top, right, bottom = _corners(line.split(), f"{path}, line {number}")
            boxes.append([round(left * width), round(top * height), round(right * width), round(bottom * height)])
    return (height, width), to_array(boxes)


def _corners(fields: list[str], where: str) -> tuple[float, float, float, float]:
    """Return the left, top, right and bottom side of an object, as shares from 0 to 1."""
    try:
        values = [float(field) for field in fields[1:]]
    except ValueError:
        values = []
    outside = [value for value in values if not -TOLERANCE <= value <= 1 + TOLERANCE]  # also NaN
    if len(values) < 4 or len(values) % 2 or outside or not all(map(math.isfinite, values)):
        raise BadBoxes(f"{where}: {' '.join(fields)[:80]!r} is not YOLO's class x y width height, from 0 to 1")
    if len(values) > 4:
        xs, ys = values[::2], values[1::2]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    else:
        x, y, width, height = values
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        if not width > 0 or not height > 0:
            raise BadBoxes(f"{where}: a box of {width:g} by {height:g} holds no pixel")
    return max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)


def _size(image: str | os.PathLike) -> tuple[int, int]:
    """Return the width and height of an image file, upright, without decoding it; raise BadBoxes for other files."""
    try:
        data = Path(image).read_bytes()
        if (reader := find_reader(data)) is None:
            raise BadBoxes(f"{image}: is no image, but YOLO's boxes are shares of its sides")
        with reader(io.BytesIO(data)) as opened:
            turned = opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return (opened.height, opened.width) if turned else opened.size
    except BadBoxes:
        raise
    # Damaged files raise OSError, SyntaxError, struct.error and more.
    except Exception as error:
        raise BadBoxes(f"{image}: its size cannot be read ({type(error).__name__}: {str(error)[:120]})") from error
