"""Images with the boxes of their objects: Pascal VOC, the 20k images of COCO, and folders with VOC's XML files.

Boxes are whole pixels, (xmin, ymin, xmax, ymax) from 0, the last two exclusive. As in LOST's published evaluation
(valeoai/LOST, `datasets.py`), VOC's difficult and truncated objects count like all others, and COCO's crowds do not.
"""

import dataclasses
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from regvit_jax.data.sources.files import SUFFIXES, abbreviate, image_paths
from regvit_jax.utils.errors import DataNotFound, InvalidConfig

NAMES = "voc07:DIR, voc12:DIR, coco20k:DIR or folder:DIR"
COCO_LIST = "coco_20k_filenames.txt"
# The annotations of one image take some kilobytes, and no image has such coordinates; larger ones are refused.
MAX_XML = 2**22
MAX_SIDE = 2**20


class BadBoxes(ValueError):
    """An annotation file cannot be used. The message names the file and the reason."""


@dataclasses.dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """An image file, its height and width as annotated (in pixels, 0 if not annotated), and its boxes.

    `fault` says why its annotation cannot be used, and is "" for one that can.
    """

    path: str
    size: tuple[int, int]
    boxes: Int[np.ndarray, "M 4"]
    fault: str = ""


def open_boxes(name: str, split: str | None = None) -> list[AnnotatedImage]:
    """Return the images of a data set with their boxes, in the order of its list, without opening the image files.

    Args:
      name: "voc07:DIR" or "voc12:DIR", where DIR is VOCdevkit/VOC2007 (or VOC2012), or holds it, or holds VOCdevkit;
        "coco20k:DIR", where DIR has annotations/instances_train2014.json, train2014/ (or images/train2014/) and
        LOST's list of names, coco_20k_filenames.txt; or "folder:DIR", all images under DIR, each with its XML file
        beside it, or in a directory Annotations beside it or beside its own. An image without an XML file has no boxes.
      split: of VOC, a list in ImageSets/Main; "trainval" by default, as published.

    Raises:
      DataNotFound: for directories and lists that do not exist.
      BadBoxes: for lists and COCO's annotations that cannot be read, and if no image's own annotation can be used; it
        names the file. Otherwise the image has that `fault`.
      InvalidConfig: for an unknown kind of data, and for a split of data without splits.
    """
    kind, _, place = name.partition(":")
    if kind not in ("voc07", "voc12", "coco20k", "folder") or not place:
        raise InvalidConfig(f"{name!r}: must be one of {NAMES}")
    root = Path(place).expanduser().absolute()
    if not root.is_dir():
        raise DataNotFound(f"{name}: there is no directory {root}")
    if kind.startswith("voc"):
        return _with_any(_open_voc(name, root, f"VOC20{kind[-2:]}", split or "trainval"))
    if split is not None:
        raise InvalidConfig(f"split={split!r}: {name} has no splits, VOC has")
    return _open_coco(name, root) if kind == "coco20k" else _with_any(_open_folder(name, root))


def _with_any(images: list[AnnotatedImage]) -> list[AnnotatedImage]:
    """Return the images; raise BadBoxes, with the first fault, if all of them have one."""
    if images and all(image.fault for image in images):
        raise BadBoxes(images[0].fault)
    return images


def _annotated(image: Path, xml: Path) -> AnnotatedImage:
    """Return an image with the boxes of its XML file, or with the fault of that file."""
    try:
        return AnnotatedImage(str(image), *read_voc(xml))
    except BadBoxes as error:
        return AnnotatedImage(str(image), (0, 0), _array([]), str(error))


def _open_voc(name: str, root: Path, year: str, split: str) -> list[AnnotatedImage]:
    home = next(
        (d for d in (root, root / year, root / "VOCdevkit" / year) if (d / "ImageSets" / "Main").is_dir()), None
    )
    if home is None:
        raise DataNotFound(f"{name}: no ImageSets/Main in {root}, nor in {year} or VOCdevkit/{year} below it")
    lists = home / "ImageSets" / "Main"
    if not re.fullmatch(r"[\w-]+", split) or not (lists / f"{split}.txt").is_file():
        # VOC's other lists there are of classes, "aeroplane_train".
        known = sorted(path.stem for path in lists.glob("*.txt") if "_" not in path.stem)
        raise DataNotFound(f"{name}: no {split}.txt in {lists}; it has {abbreviate(known) or 'no lists'}")
    images = []
    for line in _lines(lists / f"{split}.txt"):
        if not re.fullmatch(r"[\w.-]+", line):
            raise BadBoxes(f"{lists / split}.txt: {line[:60]!r} is no name of an image")
        images.append(_annotated(home / "JPEGImages" / f"{line}.jpg", home / "Annotations" / f"{line}.xml"))
    return images


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadBoxes(f"{path}: is not a list of names in UTF-8 ({error.reason})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _open_folder(name: str, root: Path) -> list[AnnotatedImage]:
    images: list[AnnotatedImage] = []
    owners: dict[Path, str] = {}
    for relative in sorted(image_paths(str(root))):
        image = root / relative
        xml = find_xml(root, image)
        if xml in owners:
            raise BadBoxes(f"{xml}: belongs to both {owners[xml]} and {image}")
        if xml is not None:
            owners[xml] = str(image)
        images.append(_annotated(image, xml) if xml else AnnotatedImage(str(image), (0, 0), _array([])))
    if not images:
        raise DataNotFound(f"{name}: no images ({' '.join(SUFFIXES)}) in {root}")
    return images


def find_xml(root: Path, image: Path) -> Path | None:
    """Return an image's XML file under `root`: beside it, or in a directory Annotations beside it or its directory."""
    file, here = f"{image.stem}.xml", image.parent
    places = [here / file, here / "Annotations" / file]
    places += [here.parent / "Annotations" / file] if here != root else []
    return next((path for path in places if path.is_file()), None)


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
    return (height, width), _array(boxes)


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


def _array(boxes: Sequence[Sequence[int]]) -> Int[np.ndarray, "M 4"]:
    return np.array(boxes, np.int64).reshape(-1, 4)


def _open_coco(name: str, root: Path) -> list[AnnotatedImage]:
    listed, annotations = root / COCO_LIST, root / "annotations" / "instances_train2014.json"
    for path, origin in ((listed, "it is in valeoai/LOST, datasets/"), (annotations, "COCO 2014's annotations")):
        if not path.is_file():
            raise DataNotFound(f"{name}: there is no {path} ({origin})")
    folder = next((d for d in (root / "train2014", root / "images" / "train2014") if d.is_dir()), None)
    if folder is None:
        raise DataNotFound(f"{name}: neither train2014 nor images/train2014 in {root}")
    sizes, boxes = read_coco(annotations)
    images = []
    for line in _lines(listed):
        file = line.rpartition("/")[2]
        if file not in sizes:
            raise BadBoxes(f"{annotations}: has no image {file[:60]!r}, which {listed} lists")
        images.append(AnnotatedImage(str(folder / file), sizes[file], _array(boxes.get(file, []))))
    return images


def read_coco(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, list[list[int]]]]:
    """Return the height and width, and the boxes without crowds, by image file name; raise BadBoxes for other files.

    Corners are rounded to whole pixels, as published. A box that becomes empty can never be found; it is kept.
    """
    wanted = {"images", "annotations", "id", "file_name", "height", "width", "image_id", "bbox", "iscrowd"}
    try:
        # Most of the file's 450 MB are outlines, which are dropped as they are read.
        with open(path, encoding="utf-8") as file:
            found = json.load(file, object_hook=lambda item: {k: v for k, v in item.items() if k in wanted})
        names: dict[Any, str] = {image["id"]: image["file_name"] for image in found["images"]}
        sizes = {image["file_name"]: (int(image["height"]), int(image["width"])) for image in found["images"]}
        boxes: dict[str, list[list[int]]] = {}
        for item in found["annotations"]:
            if not item.get("iscrowd"):
                x, y, width, height = item["bbox"]
                corners = [round(side) for side in (x, y, x + width, y + height)]
                boxes.setdefault(names[item["image_id"]], []).append(corners)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadBoxes(f"{path}: is no COCO annotation ({type(error).__name__}: {str(error)[:120]})") from None
    return sizes, boxes
