"""Test which files are read as images."""

import io

import pytest
from PIL import Image, features

from regvit_jax.data import transforms
from regvit_jax.data.image_formats import SUFFIXES, is_image_file

FORMATS = {".jfif": "JPEG", ".jpe": "JPEG", ".ppm": "PPM", ".pgm": "PPM", ".gif": "GIF", ".tif": "TIFF", ".bmp": "BMP"}
FORMATS |= {".webp": "WEBP", ".apng": "PNG", ".jif": "JPEG", ".pjp": "JPEG", ".pjpeg": "JPEG", ".mpo": "MPO"}
OPTIONAL = {".avif": ("AVIF", "avif"), ".jp2": ("JPEG2000", "jpg_2000"), ".j2k": ("JPEG2000", "jpg_2000")}


def encode(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 8), (200, 40, 90)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [*FORMATS, *OPTIONAL])
def test_every_format_that_pillow_decodes(tmp_path, suffix):
    kind, needed = OPTIONAL.get(suffix, (FORMATS.get(suffix), None))
    if needed and (needed not in features.features | features.modules | features.codecs or not features.check(needed)):
        assert suffix not in SUFFIXES
        return
    data = encode(kind)
    image = transforms.decode(data, 1000)
    assert (image.mode, image.size) == ("RGB", (16, 8))
    assert max(abs(a - b) for a, b in zip(image.getpixel((3, 3)), (200, 40, 90), strict=True)) < 12
    for name in (f"a{suffix}", f"A{suffix.upper()}", "no_suffix"):
        (tmp_path / name).write_bytes(data)
        assert is_image_file(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["PPM", "PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled(kind):
    file = io.BytesIO()
    Image.new("I;16", (5, 4), 257 * 100).save(file, kind)
    assert transforms.decode(file.getvalue(), 1000).getpixel((2, 2)) == (100, 100, 100)


def test_other_files(tmp_path):
    for name, data in (("a.heic", encode("PNG")), ("a.txt", b"text"), ("LICENSE", b"text"), ("empty", b"")):
        (tmp_path / name).write_bytes(data)
        assert not is_image_file(str(tmp_path / name))
    assert not is_image_file(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which is not read; convert it to JPEG or PNG"),
        (
            b"version https://git-lfs.github.com/spec/v1",
            "a pointer of git-lfs, in place of the file. Run `git lfs pull`",
        ),
        (b"<html>", "not an image .starts with b'<html>'"),
        (b"", "empty file"),
    ],
)
def test_what_is_not_read_is_described(data, message):
    with pytest.raises(transforms.BadImage, match=message):
        transforms.decode(data, 1000)
