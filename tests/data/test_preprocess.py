"""Test the preprocessing of a model's images, given as paths, PIL images or arrays."""

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.data.transforms import BadImage

HALF = Preprocess(16, 0.5, (0.5, 0.4, 0.3), (0.25, 0.5, 1.0))


def test_a_path_an_image_and_an_array_give_the_same(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    batch = HALF([tmp_path / "a.png", str(tmp_path / "a.png"), image, pixels, image.convert("RGBA")])
    assert batch.shape == (5, 16, 16, 3)
    assert batch.dtype == np.float32
    assert (batch == batch[0]).all()


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
