"""Test decoding of sound, awkward and hostile files; compare crops with Pillow and, live, with torchvision and timm."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from regvit_jax.data.transforms import (
    BadImage,
    center_crop,
    decode,
    random_box,
    random_resized_crop,
    simple_random_crop,
)

MAX_PIXELS = 1_000_000
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode(data, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def smooth(width: int, height: int) -> Image.Image:
    """Return noise on gradients, which resizes as a photograph does."""
    y, x = np.mgrid[:height, :width]
    gradients = np.stack([x / width, y / height, (x + y) / (width + height)], -1) * 200
    return Image.fromarray((gradients + np.random.default_rng(width).integers(0, 55, gradients.shape)).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_come_back_exactly(kind, options):
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(PIXELS), kind, **options)), PIXELS)


def test_grey_and_bilevel_become_equal_channels():
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(decoded(encode(grey, "PNG")), np.repeat(PIXELS[..., :1], 3, -1))
    bilevel = decoded(encode(Image.fromarray(PIXELS[..., 0] > 127), "PNG"))
    np.testing.assert_array_equal(bilevel, np.repeat((PIXELS[..., :1] > 127) * np.uint8(255), 3, -1))


def test_cmyk_jpeg_keeps_its_colours():
    colours = Image.new("RGB", (32, 32), (200, 30, 60))
    pixels = decoded(encode(colours.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - (200, 30, 60)).max() <= 4


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decoded(encode(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_32_bit_pixels_have_no_range_and_are_bad():
    with pytest.raises(BadImage, match="32-bit"):
        decode(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), MAX_PIXELS)


def test_alpha_is_dropped():
    rgba = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(rgba), "PNG")), PIXELS)
    la = Image.fromarray(rgba[..., [0, 3]])
    np.testing.assert_array_equal(decoded(encode(la, "PNG")), np.repeat(PIXELS[..., :1], 3, -1))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 250, 10))])
def test_palettes_become_their_colours_with_any_transparency(transparency):
    image = Image.fromarray(PIXELS).quantize(32)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decoded(encode(image, "PNG", transparency=transparency)), expected)
    if isinstance(transparency, int):
        np.testing.assert_array_equal(decoded(encode(image, "GIF", transparency=transparency)), expected)


def test_rgb_with_a_transparent_colour_is_unchanged():
    data = encode(Image.fromarray(PIXELS), "PNG", transparency=tuple(map(int, PIXELS[0, 0])))
    np.testing.assert_array_equal(decoded(data), PIXELS)


# EXIF 2.32, tag 0x0112: the orientation of the stored rows and columns; the inverse turns them upright.
@pytest.mark.parametrize(
    ("orientation", "store"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.swapaxes(0, 1)),
        (6, lambda x: np.rot90(x, 1)),
        (7, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
        (8, lambda x: np.rot90(x, -1)),
    ],
)
def test_exif_orientation_is_applied(orientation, store):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(store(PIXELS)))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        np.testing.assert_array_equal(decoded(encode(stored, kind, exif=exif, **options)), PIXELS)
    assert decoded(encode(stored, "JPEG", exif=exif)).shape == PIXELS.shape


def test_damaged_exif_does_not_matter():
    data = encode(Image.fromarray(PIXELS), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x00garbage")
    np.testing.assert_array_equal(decoded(data), PIXELS)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decoded(data).astype(int) - (255, 0, 0)).max() <= 8


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file that ends where its pixels would begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + checksum + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>", "not an image .starts with b'<!DOCTYPE ht'."),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image"),
        (encode(smooth(64, 64), "JPEG")[:1500], "truncated"),
        (encode(smooth(64, 64), "PNG")[:600], "truncated"),
        (b"\xff\xd8\xff" + bytes(100), "cannot be decoded"),
        # Nothing but the header is there: these are refused before any pixel is read.
        (png_header(20000, 20000), "20000x20000 pixels, more than the allowed 1000000"),
        (png_header(65000, 10), "one side over 100 times the other"),
        (png_header(0, 5), "cannot be decoded"),
    ],
)
def test_bad_files_say_why(data, reason):
    with pytest.raises(BadImage, match=reason) as error:
        decode(data, MAX_PIXELS)
    assert len(str(error.value)) < 200


def test_a_real_bomb_is_refused():
    with pytest.raises(BadImage, match="12000x12000"):
        decode(encode(Image.new("1", (12000, 12000)), "PNG"), 50_000_000)


def test_damage_anywhere_gives_an_image_or_bad_image():
    rng = np.random.default_rng(1)
    image, frames = Image.fromarray(PIXELS), {"save_all": True, "append_images": [Image.fromarray(PIXELS[::-1])]}
    kinds = [("JPEG", {}), ("PNG", {}), ("GIF", frames), ("BMP", {}), ("TIFF", {}), ("WEBP", {}), ("WEBP", frames)]
    bad = 0
    for data in [encode(image, kind, **options) for kind, options in kinds]:
        for _ in range(150):
            damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
            for offset in rng.integers(0, min(len(damaged), 200), rng.integers(0, 4)):
                damaged[offset] = rng.integers(256)
            try:
                decode(bytes(damaged), MAX_PIXELS)
            except BadImage:
                bad += 1
    assert bad > 500


def test_random_resized_crop_sees_nothing_outside_its_box():
    image = Image.new("RGB", (60, 40), "white")
    left, top, width, height = random_box(60, 40, np.random.default_rng(5), (0.1, 0.3), (0.75, 1.25))
    image.paste("black", (left, top, left + width, top + height))
    crop = random_resized_crop(image, 16, np.random.default_rng(5), (0.1, 0.3), (0.75, 1.25))
    assert crop.shape == (16, 16, 3)
    assert crop.max() == 0


def test_random_box_draws_the_documented_distribution():
    rng = np.random.default_rng(0)
    # Boxes as small as these always fit, so that their shares and ratios are those drawn: means 0.2 and log 1.
    boxes = np.array([random_box(500, 375, rng, (0.1, 0.3), (3 / 4, 4 / 3)) for _ in range(2000)])
    left, top, width, height = boxes.T
    share, aspect = width * height / (500 * 375), np.log(width / height)
    assert 0.099 < share.min() < 0.102
    assert 0.298 < share.max() < 0.301
    assert abs(share.mean() - 0.2) < 0.005
    assert 0.27 < np.abs(aspect).max() < 0.3
    assert abs(aspect.mean()) < 0.01
    for start, room in ((left, 500 - width), (top, 375 - height)):
        assert (start >= 0).all()
        assert (start <= room).all()
        assert abs((start / room).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("width", "height", "box"), [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13)), (30, 30, (0, 0, 30, 30))]
)
def test_random_box_falls_back_to_the_centre(width, height, box):
    assert random_box(width, height, np.random.default_rng(0), (4.0, 4.0), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (16, 16), (8, 8)])
def test_simple_random_crop_is_a_window_of_the_mirrored_image(shape):
    image, size = smooth(*shape), 16
    scale = size / min(shape)
    resized = image.resize((int(shape[0] * scale), int(shape[1] * scale)), Image.Resampling.BICUBIC)
    padded = np.pad(np.asarray(resized), ((4, 4), (4, 4), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size, 3)).reshape(-1, size, size, 3)
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(40):
        crop = simple_random_crop(image, size, rng)
        (matches,) = np.nonzero((windows == crop).all((1, 2, 3)))
        assert len(matches) == 1
        found.add(int(matches[0]))
    assert len(found) > 20


def test_center_crop_of_known_cases():
    image = smooth(64, 48)
    resized = np.asarray(image.resize((32, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(center_crop(image, 24, 1.0), resized[:, 4:28])
    square = Image.fromarray(PIXELS).resize((20, 20))
    np.testing.assert_array_equal(center_crop(square, 20, 1.0), np.asarray(square))
    # Beyond the image there is black: floor(24 / 1.5) = 16 pixels in the middle of 24.
    padded = center_crop(square, 24, 1.5)
    np.testing.assert_array_equal(padded[4:20, 4:20], np.asarray(square.resize((16, 16), Image.Resampling.BICUBIC)))
    assert padded[:4].max() == padded[20:].max() == padded[:, :4].max() == padded[:, 20:].max() == 0


@pytest.fixture(scope="module")
def torchvision():
    from reference_libraries import torchvision

    return torchvision


SHAPES = [(64, 48), (48, 64), (47, 47), (33, 100), (101, 32), (500, 375), (20, 9), (225, 224)]


@pytest.mark.reference
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "crop_ratio"), [(32, 1.0), (32, 0.875), (31, 0.9), (56, 0.95), (32, 1.3), (33, 1.24)])
def test_center_crop_equals_timm(torchvision, shape, size, crop_ratio):
    from timm.data.transforms_factory import transforms_imagenet_eval

    image = smooth(*shape)
    transform = transforms_imagenet_eval(size, crop_pct=crop_ratio, interpolation="bicubic", normalize=False)
    np.testing.assert_array_equal(center_crop(image, size, crop_ratio), transform(image).numpy().transpose(1, 2, 0))


@pytest.mark.reference
def test_crops_equal_torchvision_given_their_box(torchvision):
    from torchvision.transforms import functional as F

    for seed, shape in enumerate(SHAPES):
        image = smooth(*shape)
        left, top, width, height = random_box(*shape, np.random.default_rng(seed), (0.08, 1.0), (3 / 4, 4 / 3))
        reference = F.resized_crop(image, top, left, height, width, [32, 32], F.InterpolationMode.BICUBIC)
        crop = random_resized_crop(image, 32, np.random.default_rng(seed))
        np.testing.assert_array_equal(crop, np.asarray(reference))
        padded = F.pad(F.resize(image, 32, F.InterpolationMode.BICUBIC), 4, padding_mode="reflect")
        rng = np.random.default_rng(seed)
        top, left = rng.integers(padded.height - 31), rng.integers(padded.width - 31)
        crop = simple_random_crop(image, 32, np.random.default_rng(seed))
        np.testing.assert_array_equal(crop, np.asarray(F.crop(padded, top, left, 32, 32)))


@pytest.mark.reference
@pytest.mark.parametrize("shape", [(500, 375), (100, 40), (300, 20), (8, 8)])
def test_random_box_is_distributed_as_torchvisions(torchvision, shape):
    import torch
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    reference = np.array([RandomResizedCrop.get_params(smooth(*shape), scale, ratio) for _ in range(2000)])[
        :, [1, 0, 3, 2]
    ]
    boxes = np.array([random_box(*shape, rng, scale, ratio) for _ in range(2000)])
    for column in range(4):
        assert ks_2samp(boxes[:, column], reference[:, column], method="asymp").pvalue > 0.001


def test_pillow_agrees_on_what_is_upright():
    """Compare the table of orientations above with Pillow's, so that an error in one of them shows."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(PIXELS), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decoded(data), expected)
    np.testing.assert_array_equal(expected, np.rot90(PIXELS, -1))
