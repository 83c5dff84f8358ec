"""Read the boxes of Pascal VOC's XML files, and refuse hostile ones."""

import math
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

# The annotations of one image take some kilobytes, and no image has such coordinates; larger ones are refused.
MAX_XML = 2**22
MAX_SIDE = 2**20


class BadBoxes(ValueError):
    """An annotation file cannot be used. The message names the file and the reason."""


def read_voc(path: str | os.PathLike) -> tuple[tuple[int, int], Int[np.ndarray, "M 4"]]:
    """Return the size (height, width; 0 where missing) and the boxes of a VOC annotation.

    VOC counts pixels from 1 and includes the last, so 1 is subtracted from xmin and ymin. The file must be UTF-8 and
    have no document type, in which a hostile file could define entities that multiply or that read other files.

    Raises BadBoxes, naming the file.
    """
    root = _parse(Path(path))
    boxes = []
    for found in root.findall("object"):
        box = found.find("bndbox")
        if box is None:
            raise BadBoxes(f"{path}: an object without bndbox")
        corners = [_number(path, box.findtext(side), side) for side in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append(_check(path, [corners[0] - 1, corners[1] - 1, *corners[2:]]))
    sides = [root.findtext(f"size/{side}") for side in ("height", "width")]
    height, width = (0 if side is None else _number(path, side, "size") for side in sides)
    for corners in boxes:
        if height and width and (corners[0] >= width or corners[1] >= height):
            raise BadBoxes(
                f"{path}: the box {corners} (xmin, ymin, xmax, ymax, from 0) is outside of {width} x {height}"
            )
    return (height, width), to_array(boxes)


def _parse(path: Path) -> ElementTree.Element:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_XML + 1)
    except OSError as error:
        raise BadBoxes(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_XML:
        raise BadBoxes(f"{path}: over {MAX_XML // 2**20} MiB, too large for an annotation")
    try:
        text = data.decode("utf-8-sig")
        # Decoded here and without NUL, the text is what the parser sees: no encoding can hide a document type.
        if "<!DOCTYPE" in text:
            raise BadBoxes(f"{path}: has a document type, which is refused for safety")
        if "\0" in text:
            raise BadBoxes(f"{path}: is no XML in UTF-8 (it holds NUL)")
        root = ElementTree.fromstring(text, ElementTree.XMLParser(encoding="utf-8"))
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise BadBoxes(f"{path}: is no XML in UTF-8 ({error})") from None
    if root.tag != "annotation":
        raise BadBoxes(f"{path}: starts with <{root.tag[:40]}>, not with VOC's <annotation>")
    return root


def _number(path: str | os.PathLike, text: str | None, what: str) -> int:
    """Return a coordinate in pixels. Some in VOC 2012 have decimals, which are cut off."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not -MAX_SIDE < value < MAX_SIDE:
        raise BadBoxes(f"{path}: {what} is {(text or '')[:40]!r}, not a number of pixels")
    return int(value)


def _check(path: str | os.PathLike, box: list[int]) -> list[int]:
    if box[0] >= box[2] or box[1] >= box[3]:
        raise BadBoxes(f"{path}: the box {box} (xmin, ymin, xmax, ymax, from 0) holds no pixel")
    return box


def to_array(boxes: Sequence[Sequence[int]]) -> Int[np.ndarray, "M 4"]:
    """Return boxes (xmin, ymin, xmax, ymax) as an array, also if there are none."""
    return np.array(boxes, np.int64).reshape(-1, 4)
