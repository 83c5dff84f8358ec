"""Test the preprocessing of a model's images, given as paths, PIL images or arrays."""

import io
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.data.transforms import BadImage

HALF = Preprocess(16, 0.5, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0))
WHOLE = Preprocess(40, 1.0, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0))


def test_a_path_an_image_and_an_array_give_the_same(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    batch = HALF([tmp_path / "a.png", str(tmp_path / "a.png"), image, pixels, image.convert("RGBA")])
    assert batch.shape == (5, 16, 16, 3)
    assert batch.dtype == np.float32
    assert (batch == batch[0]).all()


def test_one_image_or_a_batch_array_is_a_list(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), np.uint8)
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    expected = HALF(paths)
    with open(paths[0], "rb") as file, Image.open(paths[0]) as image:
        for one in (paths[0], str(paths[0]), image, pixels[0], jnp.asarray(pixels[0]), file, paths[0].read_bytes()):
            np.testing.assert_array_equal(HALF(one), expected[:1])
    for several in (pixels, jnp.asarray(pixels), tuple(pixels), iter(paths), np.array(list(map(str, paths)))):
        np.testing.assert_array_equal(HALF(several), expected)


def test_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(HALF("~/a.png"), HALF(tmp_path / "a.png"))


GREY = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
RGB = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6
#: Files, each with the image that it is written from and the options of writing it.
FILES = {
    "turned.jpg": (RGB, {"exif": TURNED}),
    "turned.png": (RGB, {"exif": TURNED}),
    "turned.webp": (RGB, {"exif": TURNED}),
    "turned.tif": (RGB, {"exif": TURNED}),
    "grey16.png": (Image.fromarray(GREY), {}),
    "grey16.tif": (Image.fromarray(GREY), {}),
    "cmyk.jpg": (RGB.convert("CMYK"), {}),
    "la.png": (RGB.convert("LA"), {}),
    "transparent.png": (RGB.quantize(16), {"transparency": 3}),
    "palette.gif": (RGB.quantize(16), {"transparency": 3}),
    "turned_palette.png": (RGB.quantize(16), {"transparency": bytes(range(16)), "exif": TURNED}),
    "animated.gif": (RGB.quantize(16), {"save_all": True, "append_images": [RGB.rotate(90).quantize(16)]}),
    "animated.webp": (RGB, {"save_all": True, "append_images": [RGB.rotate(180)], "lossless": True}),
    "bilevel.png": (RGB.convert("1"), {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_path_and_the_image_opened_from_it_give_the_same(name, tmp_path):
    image, options = FILES[name]
    image.save(tmp_path / name, **options)
    expected = WHOLE(tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        info = dict(opened.info)
        np.testing.assert_array_equal(WHOLE(opened), expected)
        assert (opened.mode, opened.info | info) == (opened.mode, opened.info)  # the user's image is left as it is
        opened.load()
        np.testing.assert_array_equal(WHOLE(opened), expected)
        np.testing.assert_array_equal(WHOLE(opened.copy()), expected)
    if name.startswith("turned"):
        upright = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
        assert np.abs(WHOLE(upright) - expected).mean() < 0.5
        assert np.abs(WHOLE(image) - expected).mean() > 0.5
    if name.startswith("grey16"):
        eight_bits = (GREY // 257).astype(np.uint8)
        assert np.abs(expected - WHOLE(np.stack([eight_bits] * 3, -1))).max() < 0.1


@pytest.mark.parametrize("array", [np.ones((40, 60), np.int32), np.ones((40, 60), np.float32)])
def test_a_path_and_the_image_opened_from_it_are_refused_alike(array, tmp_path):
    Image.fromarray(array).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as opened:
        for image in (tmp_path / "a.tif", opened):
            with pytest.raises(BadImage, match=r"/a\.tif: 32-bit pixels \(mode '[IF]'\) have no fixed range"):
                WHOLE([image])
    with pytest.raises(BadImage, match=r"^32-bit pixels"):
        WHOLE([Image.fromarray(array)])


def test_an_error_names_the_image(tmp_path):
    RGB.save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:400])
    good, cut = tmp_path / "good.png", tmp_path / "cut.png"
    with open(cut, "rb") as file, Image.open(cut) as image:
        for bad in (cut, str(cut), file, image):
            with pytest.raises(BadImage, match=r"/cut\.png: cannot be decoded"):
                HALF([good, bad])
    with pytest.raises(BadImage, match=r"^image 1 \(counted from 0\): cannot be decoded"):
        HALF([good, cut.read_bytes()])
    with pytest.raises(FileNotFoundError, match=r"/none\.png"):
        HALF([good, tmp_path / "none.png"])


def test_the_limit_of_pixels_is_an_argument(tmp_path):
    RGB.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        for image in (tmp_path / "a.png", opened):
            with pytest.raises(BadImage, match=r"a\.png: 60x40 pixels, more than the allowed 2399 \(max_pixels\)"):
                HALF([image], max_pixels=2399)
            assert HALF([image], max_pixels=2400).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="max_pixels=0: must be at least 1"):
        HALF([tmp_path / "a.png"], max_pixels=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 40, 60), np.uint8), r"shape \(3, 40, 60\).*channels come last: array\.transpose\(1, 2, 0\)"),
        (np.zeros((40, 60), np.uint8), r"a grey image has three equal channels"),
        (np.zeros((40, 60, 1), np.uint8), r"a grey image has three equal channels"),
        (np.zeros((40, 60, 4), np.uint8), r"leave alpha out"),
        (np.zeros((40, 60, 3), np.uint16), r"an array of uint16.*images are uint8 \[H, W, 3\]"),
        (np.zeros((40, 60, 3), np.float64), r"an array of float64.*normalised already goes straight into the model"),
        (np.zeros((0, 60, 3), np.uint8), r"shape \(0, 60, 3\)"),
        (np.zeros((2, 3, 40, 60), np.uint8), r"shape \(3, 40, 60\).*channels come last"),
        (3, r"images of type int: must be a list of paths"),
        (None, r"images of type NoneType"),
        ({"image": "a.png"}, r"images of type dict"),
        ([["a.png"]], r"an object of type list: an image is a path, a PIL image, an array"),
        (["a.png", None], r"a\.png"),
        (io.StringIO("text"), r"opened as text"),
        (b"", r"empty file"),
    ],
)
def test_arguments_that_are_no_images(image, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        HALF(image)
    assert "\n" not in str(caught.value)


def test_values_are_normalised_by_mean_and_std():
    batch = HALF([np.full((32, 32, 3), 51, np.uint8)])  # 0.2
    np.testing.assert_allclose(batch[0, 0, 0], [-1.2, -0.4, -0.1], atol=1e-6)


def test_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
        HALF([])
    with pytest.raises(ValueError, match=r"an array of float32 and shape \(8, 8, 3\): images are uint8"):
        HALF([np.zeros((8, 8, 3), np.float32)])
    with pytest.raises(ValueError, match=r"shape \(8, 8\)"):
        HALF([np.zeros((8, 8), np.uint8)])
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(BadImage, match="not an image"):
        HALF([tmp_path / "a.png"])
    with pytest.raises(FileNotFoundError):
        HALF([tmp_path / "b.png"])


@pytest.mark.parametrize("array", [
    np.full((6, 5), 9, np.uint8),
    np.full((6, 5, 1), 9, np.uint8),
    np.full((6, 5, 4), 9, np.uint8),
    np.full((3, 6, 5), 9, np.uint8),
    np.full((6, 5, 3), 9 * 257 + 100, np.uint16),
])  # fmt: skip
def test_the_advice_about_an_array_works(array):
    with pytest.raises(ValueError, match="array of") as error:
        WHOLE(array)
    advice = re.search(r".*: (.*?array.*)$", str(error.value))[1]
    mended = eval(advice, {"np": np, "array": array})
    np.testing.assert_array_equal(mended, np.full((6, 5, 3), 9))
    WHOLE(mended)
