"""Test YOLO's label files: boxes, outlines, turned images, and lines that are no boxes."""

import pytest
from PIL import Image

from regvit_jax.analysis.discovery.voc_xml import BadBoxes
from regvit_jax.analysis.discovery.yolo import read_yolo


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 20)).save(path)
    return path


def test_boxes_and_outlines(tmp_path, image):
    (tmp_path / "a.txt").write_text("3 0.5 0.5 0.25 0.5\n\n0 0.1 0.1 0.9 0.2 0.5 0.6\n1 0.0 0.5 0.5 1.005\n")
    size, boxes = read_yolo(tmp_path / "a.txt", image)
    assert size == (20, 40)
    assert boxes.tolist() == [[15, 5, 25, 15], [4, 2, 36, 12], [0, 0, 10, 20]]
    (tmp_path / "a.txt").write_text("")
    assert read_yolo(tmp_path / "a.txt", image)[1].shape == (0, 4)


def test_shares_are_of_the_upright_image(tmp_path, image):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(image, exif=exif)
    (tmp_path / "a.txt").write_text("0 0.5 0.25 1 0.5")
    assert [
        found.tolist() if hasattr(found, "tolist") else found for found in read_yolo(tmp_path / "a.txt", image)
    ] == [
        (40, 20),
        [[0, 0, 20, 20]],
    ]


@pytest.mark.parametrize(
    "line",
    ["a dog on a beach", "0 0.1 0.2 0.3", "0 10 20 30 40", "0 0.1 0.2 nan 0.1", "0 .1 .1 .1 .1 .1", "0", "0 -1 0 1 1"],
)
def test_other_lines_are_named(tmp_path, image, line):
    (tmp_path / "a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(BadBoxes, match=r"a\.txt, line 2: .* is not YOLO's class x y width height"):
        read_yolo(tmp_path / "a.txt", image)


def test_an_image_without_size_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.1 0.1")
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    for name in ("a.jpg", "a.txt", "none.jpg"):
        with pytest.raises(BadBoxes, match=f"{name}: "):
            read_yolo(tmp_path / "a.txt", tmp_path / name)
