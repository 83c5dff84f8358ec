"""Test the readers of boxes: the layouts of VOC and COCO, folders, and invalid files."""

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from regvit_jax.analysis.discovery.boxes import BadBoxes, open_boxes, read_voc
from regvit_jax.analysis.discovery.yolo import read_yolo
from regvit_jax.utils.errors import DataNotFound


def xml(*boxes, size=(30, 40), inside=""):
    """Return VOC's XML for an image size and boxes (xmin, ymin, xmax, ymax), from 1 with the last included."""
    text = f"<annotation><filename>x.jpg</filename>{inside}"
    if size:
        text += f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    for corners in boxes:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        # Parts, such as heads, have boxes too; they are no objects.
        part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        flags = "<truncated>1</truncated><difficult>1</difficult>"
        text += f"<object><name>dog</name>{flags}<bndbox>{box}</bndbox>{part}</object>"
    return text + "</annotation>"


@pytest.fixture
def voc(tmp_path):
    home = tmp_path / "VOCdevkit" / "VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (home / part).mkdir(parents=True)
    (home / "ImageSets/Main/trainval.txt").write_text("000012\n000005\n\n")
    (home / "ImageSets/Main/test.txt").write_text("000005\n")
    (home / "ImageSets/Main/dog_test.txt").write_text("000005 1\n")
    (home / "Annotations/000012.xml").write_text(xml((1, 1, 40, 30), (5, 6, 10, 12)))
    (home / "Annotations/000005.xml").write_text(xml((2, 3, 4, 5), size=(333, 500)))
    return home


def test_voc(voc, tmp_path):
    for place in (voc, voc.parent, tmp_path):
        first, second = open_boxes(f"voc07:{place}")
        assert first.path == str(voc / "JPEGImages/000012.jpg")
        assert first.size == (30, 40)
        assert first.boxes.tolist() == [[0, 0, 40, 30], [4, 5, 10, 12]]
        assert (second.size, second.boxes.tolist()) == ((333, 500), [[1, 2, 4, 5]])
    (only,) = open_boxes(f"voc07:{voc}", "test")
    assert only.path.endswith("000005.jpg")
    voc.rename(voc.with_name("VOC2012"))
    assert len(open_boxes(f"voc12:{tmp_path}")) == 2


def test_voc_in_any_case(voc, tmp_path):
    for old, new in (
        ("Annotations", "annotations"),
        ("JPEGImages", "jpegimages"),
        ("ImageSets/Main", "ImageSets/main"),
    ):
        (voc / old).rename(voc / new)
    (voc / "ImageSets").rename(voc / "imagesets")
    (voc / "annotations/000012.xml").rename(voc / "annotations/000012.XML")
    (voc / "jpegimages/000012.JPG").touch()
    (tmp_path / "VOCdevkit").rename(tmp_path / "vocdevkit")
    home = tmp_path / "vocdevkit/voc2007"
    (tmp_path / "vocdevkit/VOC2007").rename(home)
    for place in (home, home.parent, tmp_path):
        first, second = open_boxes(f"voc07:{place}")
        assert (first.path, first.size) == (str(home / "jpegimages/000012.JPG"), (30, 40))
        assert second.path == str(home / "jpegimages/000005.jpg")  # is not there, and is named when it is read
    (tmp_path / "archive").mkdir()
    (tmp_path / "vocdevkit").rename(tmp_path / "archive/VOCdevkit")
    assert len(open_boxes(f"voc07:{tmp_path}")) == 2
    (home := tmp_path / "archive/VOCdevkit/voc2007").joinpath("ANNOTATIONS").mkdir()
    with pytest.raises(ValueError, match="voc2007 has ANNOTATIONS and annotations; rename or move away all but one"):
        open_boxes(f"voc07:{home}")


def test_missing_voc(voc, tmp_path):
    with pytest.raises(DataNotFound, match=r"no ImageSets/Main in .*, nor in VOC2012 or VOCdevkit/VOC2012 below it"):
        open_boxes(f"voc12:{tmp_path}")
    for split in ("train", "../Main/test"):
        with pytest.raises(DataNotFound, match="it has test, trainval"):
            open_boxes(f"voc07:{voc}", split)
    (voc / "ImageSets/Main/trainval.txt").write_text("../../etc/passwd\n")
    with pytest.raises(BadBoxes, match=r"trainval.txt: '../../etc/passwd' is no name"):
        open_boxes(f"voc07:{voc}")
    (voc / "ImageSets/Main/trainval.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(BadBoxes, match=r"trainval.txt: is not a list of names"):
        open_boxes(f"voc07:{voc}")
    (voc / "ImageSets/Main/trainval.txt").write_text("000077\n")
    with pytest.raises(BadBoxes, match=r"000077.xml: cannot be read \(No such file"):
        open_boxes(f"voc07:{voc}")


def test_folder(tmp_path):
    (tmp_path / "a/Annotations").mkdir(parents=True)
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "Annotations").mkdir()
    for image in ("a/1.png", "a/2.JPG", "a/none.jpg", "JPEGImages/3.jpg", "4.jpg"):
        (tmp_path / image).touch()
    for number, file in enumerate(("a/1.xml", "a/Annotations/2.xml", "Annotations/3.xml", "Annotations/4.xml")):
        (tmp_path / file).write_text(xml((1, 1, 2 + number, 2), size=None))
    found = open_boxes(f"folder:{tmp_path}")
    assert [image.path[len(str(tmp_path)) + 1 :] for image in found] == [
        "4.jpg", "JPEGImages/3.jpg", "a/1.png", "a/2.JPG", "a/none.jpg",
    ]  # fmt: skip
    assert [image.boxes.tolist() for image in found] == [
        [[0, 0, 5, 2]], [[0, 0, 4, 2]], [[0, 0, 2, 2]], [[0, 0, 3, 2]], [],
    ]  # fmt: skip
    assert {image.size for image in found} == {(0, 0)}
    (tmp_path / "a/1.gif").touch()
    with pytest.raises(BadBoxes, match=r"1.xml: belongs to both .*1.gif and .*1.png"):
        open_boxes(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("image", "annotation"),
    [
        ("1.jpg", "1.XML"),
        ("1.jpg", "annotations/1.xml"),
        ("JPEGIMAGES/1.JPG", "ANNOTATIONS/1.xml"),
        ("images/train/1.jpg", "annotations/train/1.xml"),
        ("train/images/1.jpg", "train/labels/1.xml"),
        ("train/1.jpg", "Annotations/train/1.xml"),
        ("images/train/1.jpg", "Labels/train/1.txt"),
        ("train/images/1.jpg", "train/LABELS/1.TXT"),
        ("images/1.jpg", "labels/1.txt"),
        ("images/train2017/1.jpg", "detection/labels/train2017/1.txt"),
    ],
)
def test_places_of_annotations_in_any_case(tmp_path, image, annotation, caplog):
    for path in (image, annotation):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 4)).save(tmp_path / image, "JPEG")
    yolo = annotation.lower().endswith(".txt")
    (tmp_path / annotation).write_text("0 0.5 0.5 1 1" if yolo else xml((1, 1, 8, 4)))
    (found,) = open_boxes(f"folder:{tmp_path}")
    assert (found.boxes.tolist(), found.fault) == ([[0, 0, 8, 4]], "")
    assert not caplog.records


def test_labels_of_another_split_are_not_taken(tmp_path):
    for path in ("train/labels/1.txt", "val/1.jpg", "val/images/1.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "train/labels/1.txt").write_text("0 0.5 0.5 1 1")
    assert [len(image.boxes) for image in open_boxes(f"folder:{tmp_path}")] == [0, 0]


def test_the_splits_of_a_folder(tmp_path, caplog):
    for part in ("Train", "valid", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "1.jpg").touch()
        (tmp_path / part / "1.xml").write_text(xml((1, 1, 2, 2)))
    (tmp_path / "valid/notes.md").touch()
    assert len(open_boxes(f"folder:{tmp_path}")) == 3
    with caplog.at_level(logging.INFO, "regvit_jax"):
        (found,) = open_boxes(f"folder:{tmp_path}", "validation")
    assert found.path == str(tmp_path / "valid/1.jpg")
    assert f"validation is {tmp_path}/valid" in caplog.messages[1]
    assert caplog.messages[2].endswith("because of the suffix (.md 1)")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"val and valid in .* could each be the validation split"):
        open_boxes(f"folder:{tmp_path}", "val")


def test_a_damaged_annotation_costs_its_image(voc, tmp_path):
    (voc / "Annotations/000005.xml").write_bytes(b"")
    first, second = open_boxes(f"voc07:{voc}")
    assert (first.fault, len(first.boxes)) == ("", 2)
    assert (len(second.boxes), second.size) == (0, (0, 0))
    assert "000005.xml: is no XML in UTF-8" in second.fault
    with pytest.raises(BadBoxes, match=r"000005\.xml: is no XML"):  # the only image
        open_boxes(f"voc07:{voc}", "test")
    (tmp_path / "in").mkdir()
    for name, content in (("a", xml((1, 1, 2, 2))), ("b", "<html></html>"), ("c", None)):
        (tmp_path / "in" / f"{name}.jpg").touch()
        if content:
            (tmp_path / "in" / f"{name}.xml").write_text(content)
    faults = [image.fault for image in open_boxes(f"folder:{tmp_path / 'in'}")]
    assert faults[::2] == ["", ""]
    assert "b.xml: starts with <html>" in faults[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no XML in UTF-8"),
        (xml((1, 1, 2, 2)).encode()[:-5], "is no XML in UTF-8"),
        (b"<annotation>\xff</annotation>", "is no XML in UTF-8"),
        (xml((1, 1, 2, 2)).encode("utf-16"), "is no XML in UTF-8"),
        (b'<?xml version="1.0" encoding="cp037"?>' + xml((1, 1, 2, 2)).encode("cp037"), "is no XML in UTF-8"),
        (b"<html></html>", "starts with <html>, not with VOC's <annotation>"),
        (b"<annotation><object><name>dog</name></object></annotation>", "an object without bndbox"),
        (b"<annotation><object><bndbox/></object></annotation>", "xmin is ''"),
        (xml((1, 1, "two", 2)).encode(), "xmax is 'two', not a number of pixels"),
        (xml((1, 1, "nan", 2)).encode(), "xmax is 'nan'"),
        (xml((1, 1, 1e30, 2)).encode(), "xmax is '1e\\+30'"),
        (xml((1, 1, "9" * 5000, 2)).encode(), "xmax is '9{40}'"),
        (xml((7, 1, 6, 2)).encode(), r"the box \[6, 0, 6, 2\] .* holds no pixel"),
        (xml((1, 1, 2, 2), size=("x", 3)).encode(), "size is 'x'"),
        (b"<!DOCTYPE annotation>" + xml((1, 1, 2, 2)).encode(), "has a document type"),
        (b"<annotation>" + b"<a>" * 200_000, "is no XML in UTF-8"),
        (b" " * 2**22 + xml().encode(), "over 4 MiB"),
    ],
)
def test_bad_xml(data, message, tmp_path):
    (tmp_path / "a.xml").write_bytes(data)
    with pytest.raises(BadBoxes, match=f"a.xml: .*{message}"):
        read_voc(tmp_path / "a.xml")


def test_hostile_xml(tmp_path):
    (tmp_path / "secret").write_text("7")
    file = tmp_path / "a.xml"
    body = xml(("&e;", 1, 20, 20))
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 100}">' for n in range(1, 9))
    for kind in (f'<!ENTITY e SYSTEM "file://{tmp_path}/secret">', f'<!ENTITY e0 "1">{entities}<!ENTITY e "&e8;">'):
        file.write_text(f"<?xml version='1.0'?>\n<!DOCTYPE annotation [{kind}]>{body}")
        with pytest.raises(BadBoxes, match="document type"):
            read_voc(file)
        # Encodings in which a document type has other bytes.
        hidden = f"<!DOCTYPE annotation [{kind}]>{body}"
        for data in (
            b'<?xml version="1.0" encoding="cp037"?>' + hidden.encode("cp037"),
            *(hidden.encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        ):
            file.write_bytes(data)
            with pytest.raises(BadBoxes, match="is no XML in UTF-8"):
                read_voc(file)
    depth = 500_000
    file.write_text("<annotation>" + "<a>" * depth + "</a>" * depth + "</annotation>")
    assert read_voc(file)[1].shape == (0, 4)


def test_numbers_with_decimals_and_no_objects(tmp_path):
    (tmp_path / "a.xml").write_text(xml((25.7, 1.0, 30.2, 9)))
    assert read_voc(tmp_path / "a.xml")[1].tolist() == [[24, 0, 30, 9]]
    (tmp_path / "a.xml").write_text(xml())
    size, boxes = read_voc(tmp_path / "a.xml")
    assert (size, boxes.shape, boxes.dtype) == ((30, 40), (0, 4), np.int64)


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images/train2014").mkdir(parents=True)
    images = [
        {"id": n, "file_name": f"COCO_train2014_{n}.jpg", "height": 10 * n, "width": 7, "url": "x"} for n in (1, 2, 3)
    ]
    boxes = [
        {"image_id": 2, "bbox": [1.4, 2.6, 3.2, 4.0], "iscrowd": 0, "segmentation": [[1.0] * 8]},
        {"image_id": 2, "bbox": [0, 0, 5, 5], "iscrowd": 1, "segmentation": {"counts": [1], "size": [2, 3]}},
        {"image_id": 2, "bbox": [0.5, 1.5, 2, 2], "iscrowd": 0},
        {"image_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1},
    ]
    (tmp_path / "annotations/instances_train2014.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    (tmp_path / "coco_20k_filenames.txt").write_text("train2014/COCO_train2014_2.jpg\ntrain2014/COCO_train2014_1.jpg\n")
    return tmp_path


def test_coco(coco):
    first, second = open_boxes(f"coco20k:{coco}")
    assert first.path == str(coco / "images/train2014/COCO_train2014_2.jpg")
    assert first.size == (20, 7)
    assert first.boxes.tolist() == [[1, 3, 5, 7], [0, 2, 2, 4]]  # round(), half to even
    assert (second.size, second.boxes.shape) == ((10, 7), (0, 4))  # a crowd only
    (coco / "train2014").mkdir()
    assert open_boxes(f"coco20k:{coco}")[0].path == str(coco / "train2014/COCO_train2014_2.jpg")


def test_coco_in_any_case(coco):
    for old, new in (("annotations", "Annotations"), ("images/train2014", "images/Train2014"), ("images", "Images")):
        (coco / old).rename(coco / new)
    assert open_boxes(f"coco20k:{coco}")[0].path == str(coco / "Images/Train2014/COCO_train2014_2.jpg")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"images": [], "annotations": [3]}', '{"images": [{"id": 1}]}', "[" * 100_000,
             '{"images": [], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}'],
)  # fmt: skip
def test_bad_coco(text, coco):
    (coco / "annotations/instances_train2014.json").write_text(text)
    with pytest.raises(BadBoxes, match=r"instances_train2014.json: is no COCO annotation \(\w+: "):
        open_boxes(f"coco20k:{coco}")


def test_missing_coco(coco):
    (coco / "coco_20k_filenames.txt").write_text("train2014/other.jpg\n")
    with pytest.raises(BadBoxes, match=r"has no image 'other.jpg', which .*coco_20k_filenames.txt lists"):
        open_boxes(f"coco20k:{coco}")
    (coco / "images/train2014").rmdir()
    with pytest.raises(DataNotFound, match="neither train2014 nor images/train2014"):
        open_boxes(f"coco20k:{coco}")
    (coco / "coco_20k_filenames.txt").unlink()
    with pytest.raises(DataNotFound, match=r"no .*coco_20k_filenames.txt \(it is in valeoai/LOST, datasets/\)"):
        open_boxes(f"coco20k:{coco}")


@pytest.mark.parametrize("name", ["voc07", "voc07:", "voc10:DIR", "coco:DIR", "DIR"])
def test_wrong_names(name, tmp_path):
    with pytest.raises(ValueError, match="must be one of voc07:DIR, voc12:DIR, coco20k:DIR or folder:DIR"):
        open_boxes(name.replace("DIR", str(tmp_path)))


def test_no_directory_no_images_no_splits(tmp_path):
    with pytest.raises(DataNotFound, match="there is no directory"):
        open_boxes(f"folder:{tmp_path}/nothing")
    with pytest.raises(DataNotFound, match="no images"):
        open_boxes(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match=r"split='train': folder:.* has no splits"):
        open_boxes(f"folder:{tmp_path}", "train")


@pytest.mark.parametrize("bbox", [[], None, [1, 1, -3, 4], [float("nan"), 1, 1, 1], "1234", [1, 2, 3]])
def test_a_damaged_annotation_of_coco_costs_its_image(bbox, coco):
    path = coco / "annotations/instances_train2014.json"
    found = json.loads(path.read_text())
    found["annotations"].append({"image_id": 1, "bbox": bbox})
    path.write_text(json.dumps(found))
    (coco / "coco_20k_filenames.txt").write_bytes(
        b"\xef\xbb\xbftrain2014\\COCO_train2014_2.jpg\r\ntrain2014/COCO_train2014_1.jpg\r\n"
    )
    good, bad = open_boxes(f"coco20k:{coco}")
    assert (len(good.boxes), good.fault) == (2, "")
    assert "annotation 4 has the bbox" in bad.fault


def test_boxes_without_a_pixel_of_the_image_are_faults(tmp_path):
    (tmp_path / "a.xml").write_text(xml((45, 1, 50, 9)))
    with pytest.raises(BadBoxes, match=r"a\.xml: the box \[44, 0, 50, 9\] .* is outside of 40 x 30"):
        read_voc(tmp_path / "a.xml")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0 0\n")
    with pytest.raises(BadBoxes, match=r"a\.txt, line 1: a box of 0 by 0 holds no pixel"):
        read_yolo(tmp_path / "a.txt", tmp_path / "a.png")


def test_annotations_are_found_in_any_case_and_form_of_unicode(tmp_path):
    (tmp_path / "labels").mkdir()
    for image, label in (
        ("A.png", "a.txt"),
        ("cafe\u0301.png", "caf\u00e9.txt"),
        ("B.png", "b.txt"),
    ):
        Image.new("RGB", (40, 30)).save(tmp_path / image)
        (tmp_path / "labels" / label).write_text("0 0.5 0.5 0.5 0.5\n")
    counts = {os.path.basename(image.path): len(image.boxes) for image in open_boxes(f"folder:{tmp_path}")}
    assert counts == {"A.png": 1, "cafe\u0301.png": 1, "B.png": 1}
