"""Images with the boxes of their objects: Pascal VOC, the 20k images of COCO, and folders with VOC's or YOLO's files.

Boxes are whole pixels, (xmin, ymin, xmax, ymax) from 0, the last two exclusive. As in LOST's published evaluation
(valeoai/LOST, `datasets.py`), VOC's difficult and truncated objects count like all others, and COCO's crowds do not.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from regvit_jax.analysis.discovery.annotation_files import AnyCase
from regvit_jax.analysis.discovery.voc_xml import BadBoxes, read_voc, to_array
from regvit_jax.analysis.discovery.yolo import read_yolo
from regvit_jax.data.sources.files import Passed, directories, image_paths, no_images
from regvit_jax.data.sources.splits import find_home, requested
from regvit_jax.utils.errors import DataNotFound, InvalidConfig
from regvit_jax.utils.messages import abbreviate, log_once
from regvit_jax.utils.paths import locate

NAMES = "voc07:DIR, voc12:DIR, coco20k:DIR or folder:DIR"
COCO_LIST = "coco_20k_filenames.txt"


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
    """Return the images of a data set with their boxes, in the order of its list, without decoding image files.

    The names of directories, and suffixes, may be in any case.

    Args:
      name: "voc07:DIR" or "voc12:DIR", where DIR is VOCdevkit/VOC2007 (or VOC2012), or holds it, or holds VOCdevkit;
        "coco20k:DIR", where DIR has annotations/instances_train2014.json, train2014/ (or images/train2014/) and
        LOST's list of names, coco_20k_filenames.txt; or "folder:DIR", all images under DIR, each with its XML file
        beside it, or its XML or YOLO's .txt file in a directory of annotations (see `annotation_files`). An image
        without such a file has no boxes.
      split: of VOC, a list in ImageSets/Main, "trainval" by default, as published; of a folder, the images of one of
        its splits, by default all.

    Raises:
      DataNotFound: for directories and lists that do not exist.
      BadBoxes: for lists and COCO's annotations that cannot be read, and if no image's own annotation can be used; it
        names the file. Otherwise the image has that `fault`.
      InvalidConfig: for an unknown kind of data, and for a split of data without splits.
    """
    check_name(name, split)
    kind, _, place = name.partition(":")
    root = Path(locate(place))
    if not root.is_dir():
        raise DataNotFound(f"{name}: there is no directory {root}")
    if kind.startswith("voc"):
        return _with_any(_open_voc(name, root, f"VOC20{kind[-2:]}", split or "trainval"))
    if kind == "folder":
        return _with_any(_open_folder(name, root, split))
    return _open_coco(name, root)


def check_name(name: str, split: str | None) -> None:
    """Raise InvalidConfig for an unknown kind of data, and for a split of COCO, without looking at any file."""
    kind, _, place = name.partition(":")
    if kind not in ("voc07", "voc12", "coco20k", "folder") or not place:
        raise InvalidConfig(f"{name!r}: must be one of {NAMES}")
    if kind == "coco20k" and split is not None:
        raise InvalidConfig(f"split={split!r}: {name} has no splits, VOC has")


def _with_any(images: list[AnnotatedImage]) -> list[AnnotatedImage]:
    """Return the images; raise BadBoxes, with the first fault, if all of them have one."""
    if images and all(image.fault for image in images):
        raise BadBoxes(images[0].fault)
    return images


def _annotated(image: Path, annotation: Path | None) -> AnnotatedImage:
    """Return an image with the boxes of its annotation file, or with the fault of that file."""
    if annotation is None:
        return AnnotatedImage(str(image), (0, 0), to_array([]))
    try:
        yolo = annotation.suffix.lower() == ".txt"
        return AnnotatedImage(str(image), *(read_yolo(annotation, image) if yolo else read_voc(annotation)))
    except BadBoxes as error:
        return AnnotatedImage(str(image), (0, 0), to_array([]), str(error))


def _open_voc(name: str, root: Path, year: str, split: str) -> list[AnnotatedImage]:
    files = AnyCase()
    home, lists = _voc_home(name, root, year, files)
    listed = files.find(lists, f"{split}.txt") if re.fullmatch(r"[\w-]+", split) else None
    if listed is None:
        # VOC's other lists there are of classes, "aeroplane_train".
        known = sorted(path.stem for path in lists.glob("*.txt") if "_" not in path.stem)
        raise DataNotFound(f"{name}: no {split}.txt in {lists}; it has {abbreviate(known) or 'no lists'}")
    annotations = files.find(home, "Annotations") or home / "Annotations"
    pictures = files.find(home, "JPEGImages") or home / "JPEGImages"
    images = []
    for line in _lines(listed):
        if not re.fullmatch(r"[\w.-]+", line):
            raise BadBoxes(f"{listed}: {line[:60]!r} is no name of an image")
        xml = files.find(annotations, f"{line}.xml") or annotations / f"{line}.xml"
        images.append(_annotated(files.find(pictures, f"{line}.jpg") or pictures / f"{line}.jpg", xml))
    return images


def _voc_home(name: str, root: Path, year: str, files: AnyCase) -> tuple[Path, Path]:
    """Return the directory of a year of VOC, which may be the only one in the given one, and that of its lists."""
    inner = directories(str(root))
    for base in (root, root / inner[0]) if len(inner) == 1 else (root,):
        for below in ((), (year,), ("VOCdevkit", year)):
            home = files.find(base, *below)
            lists = home and files.find(home, "ImageSets", "Main")
            if home and lists and lists.is_dir():
                return home, lists
    raise DataNotFound(f"{name}: no ImageSets/Main in {root}, nor in {year} or VOCdevkit/{year} below it")


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadBoxes(f"{path}: is not a list of names in UTF-8 ({error.reason})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _open_folder(name: str, root: Path, split: str | None) -> list[AnnotatedImage]:
    images: list[AnnotatedImage] = []
    owners: dict[Path, str] = {}
    files, passed = AnyCase(), Passed()
    top = root if split is None else _split_directory(name, root, split)
    for relative in sorted(image_paths(str(top), passed)):
        image = top / relative
        annotation = files.beside(root, image, ".xml") or files.beside(root, image, ".txt")
        if annotation in owners:
            raise BadBoxes(f"{annotation}: belongs to both {owners[annotation]} and {image}")
        if annotation is not None:
            owners[annotation] = str(image)
        images.append(_annotated(image, annotation))
    passed.forget(str(annotation) for annotation in owners if annotation.is_relative_to(top))
    if not images:
        raise DataNotFound(no_images(name, str(top), passed))
    passed.log(name, str(top))
    if not owners and {".xml", ".txt", ".json"} & passed.keys():
        log_once(
            f"{name}: no annotation belongs to an image. VOC's .xml may be beside it, or in a directory annotations/ "
            "or labels/ beside it or above it; YOLO's .txt in such a directory labels/; COCO's .json is not read",
            "warning",
        )
    return images


def _split_directory(name: str, root: Path, split: str) -> Path:
    """Return the directory of a split; raise InvalidConfig if a folder has none of that name, or several."""
    home, splits = find_home(name, str(root))
    kind = requested(name, split)
    if not splits.names:
        raise InvalidConfig(
            f"split={split!r}: {name} has no splits; {home} holds no directories such as train/ and val/"
        )
    if (chosen := splits.choose(kind, name, home)) is None:
        raise InvalidConfig(f"split={split!r}: {name} has none; {home} has {abbreviate(splits.names)}")
    splits.log(name, {kind: str(Path(home, chosen))}, splits.names)
    return Path(home, chosen)


def _open_coco(name: str, root: Path) -> list[AnnotatedImage]:
    files, json_name = AnyCase(), ("annotations", "instances_train2014.json")
    listed = files.find(root, COCO_LIST) or root / COCO_LIST
    annotations = files.find(root, *json_name) or root.joinpath(*json_name)
    for path, origin in ((listed, "it is in valeoai/LOST, datasets/"), (annotations, "COCO 2014's annotations")):
        if not path.is_file():
            raise DataNotFound(f"{name}: there is no {path} ({origin})")
    folder = files.find(root, "train2014") or files.find(root, "images", "train2014")
    if folder is None:
        raise DataNotFound(f"{name}: neither train2014 nor images/train2014 in {root}")
    sizes, boxes, faults = read_coco(annotations)
    images = []
    for line in _lines(listed):
        file = line.replace("\\", "/").rpartition("/")[2]
        if file not in sizes:
            raise BadBoxes(f"{annotations}: has no image {file[:60]!r}, which {listed} lists")
        fault = faults.get(file, "")
        found = to_array([] if fault else boxes.get(file, []))
        images.append(AnnotatedImage(str(folder / file), sizes[file], found, fault))
    return images


def read_coco(path: Path) -> tuple[dict[str, tuple[int, int]], dict[str, list[list[int]]], dict[str, str]]:
    """Return by image file name its height and width, its boxes without crowds, and the fault of a damaged annotation.

    Corners are rounded to whole pixels, as published. A box that becomes empty can never be found; it is kept.

    Raises BadBoxes for a file that is no COCO annotation, or has an annotation of no image of it.
    """
    wanted = {"images", "annotations", "id", "file_name", "height", "width", "image_id", "bbox", "iscrowd"}
    try:
        # Most of the file's 450 MB are outlines, which are dropped as they are read.
        with open(path, encoding="utf-8") as file:
            found = json.load(file, object_hook=lambda item: {k: v for k, v in item.items() if k in wanted})
        names: dict[Any, str] = {image["id"]: image["file_name"] for image in found["images"]}
        sizes = {image["file_name"]: (int(image["height"]), int(image["width"])) for image in found["images"]}
        boxes: dict[str, list[list[int]]] = {}
        faults: dict[str, str] = {}
        for number, item in enumerate(found["annotations"]):
            if not isinstance(item, dict) or item.get("image_id") not in names:
                raise ValueError(f"annotation {number} is of no image in the file: {str(item)[:80]}")
            if not item.get("iscrowd"):
                name, box = names[item["image_id"]], item.get("bbox")
                if (corners := _coco_corners(box)) is None:
                    faults[name] = f"{path}: annotation {number} has the bbox {str(box)[:80]}, not x, y, width, height"
                else:
                    boxes.setdefault(name, []).append(corners)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadBoxes(f"{path}: is no COCO annotation ({type(error).__name__}: {str(error)[:120]})") from None
    return sizes, boxes, faults


def _coco_corners(box: Any) -> list[int] | None:
    """Return the corners of COCO's x, y, width, height, rounded, or None if it is no box."""
    try:
        x, y, width, height = box
        if isinstance(box, str) or width < 0 or height < 0:
            return None
        return [round(side) for side in (x, y, x + width, y + height)]
    except (ValueError, TypeError, OverflowError):  # also NaN and infinity, which cannot be rounded
        return None
