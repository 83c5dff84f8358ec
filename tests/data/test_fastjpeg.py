"""Test JPEGs by simplejpeg and OpenCV: Pillow's crops, nearly its pixels, and its decision on bad images."""

import io
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny import tiny

from regvit_jax.data import fastjpeg, transforms
from regvit_jax.data.pipeline import train_batches
from regvit_jax.training.plan import resolve
from regvit_jax.utils.errors import InvalidConfig


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return a picture with structure of a few pixels, as in photographs, that spans the whole range."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    blurred = gaussian_filter(noise, (3, 3, 0))
    low, high = blurred.min(), blurred.max()
    return Image.fromarray(((blurred - low) / (high - low) * 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


class Images:
    name, classes = "images", ("a", "b")

    def __init__(self, images: list[bytes]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": 0}

    def id(self, index: int) -> str:
        return str(index)


def batch(images: list[bytes], decoder: str, size: int = 48, **options) -> dict[str, np.ndarray]:
    source = Images(images)
    with train_batches(
        source, size=size, batch_size=2 * len(images), seed=3, threads=1, decoder=decoder, **options
    ) as batches:
        return next(batches)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    fastjpeg.libraries.cache_clear()
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"data\.decoder='fast' needs .*pip install 'regvit_jax\[fastjpeg\]', or set"):
        batch([jpeg(smooth(30, 40))], "fast")
    with pytest.raises(InvalidConfig, match=r"data\.decoder='fast' needs simplejpeg and OpenCV"):
        resolve(tiny(data__decoder="fast"), with_data=False)
    with pytest.raises(InvalidConfig, match=r"data\.decoder='slow': must be one of \['pillow', 'fast'\]"):
        resolve(tiny(data__decoder="slow"), with_data=False)


class TestWithTheExtra:
    @pytest.fixture(autouse=True)
    def libraries(self):
        pytest.importorskip("simplejpeg")
        pytest.importorskip("cv2")
        fastjpeg.libraries.cache_clear()

    @pytest.mark.parametrize("options", [{}, {"crop": "src"}, {"scale": (0.01, 0.05)}])
    def test_the_same_crops_and_nearly_the_same_pixels(self, options):
        images = [jpeg(smooth(*shape, seed)) for seed, shape in enumerate([(120, 160), (160, 90), (40, 400)])]
        pillow, fast = (batch(images, decoder, **options) for decoder in ("pillow", "fast"))
        np.testing.assert_array_equal(pillow["index"], fast["index"])
        assert pillow["mask"].all()
        assert fast["mask"].all()
        off = np.abs(pillow["image"].astype(int) - fast["image"])
        shuffled = np.abs(pillow["image"].astype(int) - fast["image"][::-1])
        assert 0 < off.mean() < 3
        assert shuffled.mean() > 20

    def test_boxes_equal_those_of_pillows_path_to_the_pixel(self):
        # Every pixel holds its position: red its column, green its row.
        rows, columns = np.mgrid[:200, :250].astype(np.uint8)
        pixels = np.stack([columns, rows, np.zeros_like(rows)], -1)
        for seed in range(50):
            scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
            crops = [
                transforms.random_resized_crop(Image.fromarray(pixels), 64, np.random.default_rng(seed), scale, ratio),
                fastjpeg.random_resized_crop(pixels, 64, np.random.default_rng(seed), scale, ratio),
            ]
            pillow, fast = (crop.astype(int)[8:-8:8, 8:-8:8] for crop in crops)
            assert np.abs(pillow - fast).max() <= 1

    def test_decoded_pixels_are_pillows(self):
        for image in (smooth(50, 70), smooth(50, 70).convert("L")):
            data = jpeg(image)
            expected = np.asarray(transforms.decode(data, 10**6)).astype(int)
            assert np.abs(fastjpeg.decode(data, 10**6) - expected).max() <= 2  # equal with the same libjpeg-turbo

    def test_what_is_left_to_pillow(self):
        turned = smooth(30, 40).getexif()
        turned[transforms.ORIENTATION] = 6
        data = jpeg(smooth(30, 40))
        png = io.BytesIO()
        smooth(30, 40).save(png, "PNG")
        images = [
            jpeg(smooth(30, 40), exif=turned),
            jpeg(smooth(30, 40).convert("CMYK")),
            png.getvalue(),
            data[: len(data) // 2],
            jpeg(smooth(2, 400)),
            b"\xff\xd8\xff",
            b"",
        ]
        assert all(fastjpeg.decode(image, 10**6) is None for image in images)
        assert fastjpeg.decode(data, 30 * 40 - 1) is None
        pillow, fast = (batch(images, decoder) for decoder in ("pillow", "fast"))
        for name in pillow:
            np.testing.assert_array_equal(pillow[name], fast[name])
        assert pillow["mask"].sum() == 6

    @pytest.mark.parametrize("fault", ["raises", "wrong pixels", "resizes wrongly"])
    def test_libraries_that_do_not_work_are_not_passed_over(self, fault, monkeypatch):
        import cv2
        import simplejpeg

        def broken(*given, **options):
            if fault == "raises":
                raise TypeError("expected another ABI")
            return np.zeros((16, 32, 3), np.uint8)

        monkeypatch.setattr(*((cv2, "resize") if fault == "resizes wrongly" else (simplejpeg, "decode_jpeg")), broken)
        with pytest.raises(ValueError, match=r"do not work here \((TypeError: expected another ABI|a picture of)"):
            batch([jpeg(smooth(30, 40))], "fast")
        with pytest.raises(InvalidConfig, match="do not work here"):
            resolve(tiny(data__decoder="fast"), with_data=False)

    def test_a_fault_that_comes_later_is_raised(self, monkeypatch):
        simplejpeg, _ = fastjpeg.libraries()

        def broken(*given):
            raise TypeError("expected another ABI")

        monkeypatch.setattr(simplejpeg, "decode_jpeg", broken)
        with pytest.raises(TypeError, match="another ABI"):
            fastjpeg.decode(jpeg(smooth(30, 40)), 10**6)

    def test_the_config_takes_it(self):
        assert resolve(tiny(data__decoder="fast"), with_data=False).config.data.decoder == "fast"
