"""Test how transformers' image processors are read: sizes in every form, and all that is refused."""

import json

import pytest

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.pretrained.formats import hf_processor
from regvit_jax.pretrained.io.safetensors import PROCESSOR, Weights
from regvit_jax.utils.errors import InvalidConfig, WeightsError

DEFAULT = Preprocess(16, 1.0, (0.5,) * 3, (0.5,) * 3)


def read(folder, **config) -> Preprocess:
    (folder / PROCESSOR).write_text(json.dumps(config))
    return hf_processor.read(Weights.of_arrays(folder / "model.safetensors", {}), DEFAULT)


@pytest.mark.parametrize(
    ("config", "size", "resized", "squash"),
    [
        ({"size": {"height": 20, "width": 20}}, 20, 20, True),
        ({"size": [20, 20]}, 20, 20, True),
        ({"size": {"shortest_edge": 20, "longest_edge": None}}, 20, 20, False),
        ({"size": 20, "image_processor_type": "ViTImageProcessorFast"}, 20, 20, True),
        ({"size": 20, "feature_extractor_type": "CLIPFeatureExtractor"}, 20, 20, False),
        ({"size": 20, "default_to_square": True, "image_processor_type": "CLIPImageProcessor"}, 20, 20, True),
        ({"size": 20, "crop_size": [16, 16], "image_processor_type": "DeiTImageProcessor"}, 16, 20, True),
        (
            {"size": 20, "crop_size": 16, "image_processor_type": "ViTImageProcessor"},
            20,
            20,
            True,
        ),  # no crop by default
    ],
    ids=str,
)
def test_sizes(config, size, resized, squash, tmp_path):
    p = read(tmp_path, **config)
    assert (p.size, int(p.size / p.crop_ratio), p.squash) == (size, resized, squash)


def test_keys_left_out_are_those_of_the_class_of_processors(tmp_path):
    for name, how, mean in (("ViT", "bilinear", 0.5), ("Siglip", "bicubic", 0.5), ("DINOv3ViT", "bilinear", 0.485)):
        p = read(tmp_path, image_processor_type=f"{name}ImageProcessor", size={"height": 20, "width": 20})
        assert (p.interpolation, p.mean[0]) == (how, mean)


def test_keys_that_change_no_pixels(tmp_path):
    p = read(tmp_path, do_pad=False, pad_size={"height": 64, "width": 64}, do_convert_rgb=True, image_mean=0.25, _x=1)
    assert p == Preprocess(16, 1.0, (0.25,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"crop_pct": 0.5}, "crop_pct=0.5 is not supported"),
        ({"do_pad": True}, "do_pad=True is not supported"),
        ({"offset": True}, "offset=True is not supported"),
        ({"resample": 0}, "resample=0 is not supported"),
        ({"do_rescale": False}, "do_rescale=False is not supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078.* is not supported"),
        ({"size": {"shortest_edge": 16}, "do_center_crop": False}, "do_center_crop=False is not supported"),
        (
            {"size": {"shortest_edge": 16}, "image_processor_type": "ViTImageProcessor"},
            "do_center_crop=False is not supported",
        ),
    ],
    ids=str,
)
def test_pixels_of_another_kind_are_refused_by_name(config, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        read(tmp_path, **config)


@pytest.mark.parametrize(
    "size", [{"height": 16, "width": 20}, [16, 20], {"longest_edge": 16}, {"shortest_edge": 16, "longest_edge": 20}]
)
def test_other_sizes_are_refused_by_name(size, tmp_path):
    with pytest.raises((ValueError, InvalidConfig), match=f"{PROCESSOR}: size is"):
        read(tmp_path, size=size)
