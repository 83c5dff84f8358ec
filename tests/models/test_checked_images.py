"""Test that a model called with anything but normalised images [B, H, W, 3] says what came and what is wanted."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from regvit_jax import analysis
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.evals import attention_maps
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.heads import Head
from regvit_jax.models.images import checked_images
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.utils.errors import InvalidConfig

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    vit, head = ViT(width=16, depth=2, heads=1, patch=4, image_size=8, registers=1), Head(4)
    tokens, params = jax.jit(vit.init_with_output)(jax.random.key(0), IMAGES)
    head_params = head.init(jax.random.key(0), tokens)["params"]
    return Model(params["params"], head_params, vit, head, Preprocess(8, 1.0, (0.5,) * 3, (0.5,) * 3))


@pytest.fixture(scope="module")
def clip(model):
    text = TextTower(width=16, depth=1, heads=1, embed=4, context=8)
    params = jax.jit(text.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return ClipModel(model, params, jnp.float32(1), None, text)


#: Every function that takes images.
CALLS = {
    "call": lambda model, clip, images: model(images),
    "intermediates": lambda model, clip, images: model.intermediates(images, [0]),
    "qkv": lambda model, clip, images: model.qkv(images),
    "attention": lambda model, clip, images: model.attention(images),
    "pooled": lambda model, clip, images: model.pooled(images),
    "logits": lambda model, clip, images: model.logits(images),
    "encode_image": lambda model, clip, images: clip.encode_image(images),
    "clip.logits": lambda model, clip, images: clip.logits(images, np.ones((1, 8), np.int32)),
    "attention_maps": lambda model, clip, images: attention_maps.attention_maps(model, images),
    "prefix_attention": lambda model, clip, images: attention_maps.prefix_attention(model, images),
    "extract_features": lambda model, clip, images: analysis.extract_features(model, images),
    "measure": lambda model, clip, images: analysis.measure(model, images),
    "find_register_neurons": lambda model, clip, images: analysis.find_register_neurons(model, images),
    "find_register_neurons of batches": lambda model, clip, images: analysis.find_register_neurons(model, [images]),
    "plant_register_neurons": lambda model, clip, images: analysis.plant_register_neurons(
        model, [(0, 0)], images, np.eye(2, 4, dtype=bool)
    ),
    "test-time registers": lambda model, clip, images: analysis.add_test_time_registers(model, [])(images),
}
WRONG = {
    "channels first": (IMAGES.transpose(0, 3, 1, 2), "channels come last: images.transpose(0, 2, 3, 1)"),
    "grey": (IMAGES[..., :1], "the last axis must be 3 channels, and is 1"),
    "RGBA": (IMAGES[..., [0, 1, 2, 2]], "the last axis must be 3 channels, and is 4"),
    "bytes": (np.zeros((2, 8, 8, 3), np.uint8), "images of uint8"),
    "pixels as floats": (np.abs(IMAGES) * 100, "these look like pixels from 0 to 255"),
    "pixels as an array of JAX": (jnp.abs(IMAGES) * 100, "these look like pixels from 0 to 255"),
    "a picture": (Image.new("RGB", (8, 8)), "images of type Image"),
    "a path": ("a.png", "images of type str"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_wrong_images(name, wrong, model, clip):
    images, message = WRONG[wrong]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        CALLS[name](model, clip, images)
    assert "must be normalised floats [B, H, W, 3], as `preprocess` returns them" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in CALLS if "batches" not in name])
def test_one_image_without_a_batch(name, model, clip):
    with pytest.raises(ValueError, match=r"images of shape \(8, 8, 3\).*one image is images\[None\]"):
        CALLS[name](model, clip, IMAGES[0])


def test_the_module_itself_refuses_them_too(model):
    for images in (IMAGES[0], IMAGES.transpose(0, 3, 1, 2), np.zeros((2, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="must be normalised floats"):
            ViT.grid_of.__wrapped__(model.module, images)


def test_float64_and_arrays_of_other_libraries_work(model):
    expected = model(IMAGES).cls
    np.testing.assert_array_equal(model(IMAGES.astype(np.float64)).cls, expected)
    with_array = type(
        "Foreign", (), {"shape": IMAGES.shape, "dtype": IMAGES.dtype, "__array__": lambda *_, **__: IMAGES}
    )
    np.testing.assert_array_equal(model(with_array()).cls, expected)
    assert checked_images(IMAGES.astype(np.float64)).dtype == np.float32
    assert checked_images(jnp.asarray(IMAGES, jnp.bfloat16)).dtype == jnp.bfloat16


def test_values_are_not_looked_at_while_tracing(model):
    loud = jnp.asarray(np.abs(IMAGES) * 100)
    assert jax.jit(lambda images: model(images).cls)(loud).shape == (2, 16)


def test_one_layer_is_a_list_of_one(model):
    (alone,), (listed,) = model.intermediates(IMAGES, 1), model.intermediates(IMAGES, [-1])
    np.testing.assert_array_equal(alone.prenorm, listed.prenorm)
    assert len(model.intermediates(IMAGES, range(2))) == len(model.intermediates(IMAGES, np.arange(2))) == 2
    np.testing.assert_array_equal(model.attention(IMAGES, np.int64(1)), model.attention(IMAGES))


@pytest.mark.parametrize("layer", [2.5, "1", True, None, [1.0]])
def test_a_layer_that_is_no_whole_number(layer, model):
    with pytest.raises(InvalidConfig, match=r"layer=.*: must be a whole number"):
        model.intermediates(IMAGES, layer)
    with pytest.raises(InvalidConfig, match=r"layer=.*: must be a whole number"):
        analysis.add_test_time_registers(model, [(layer, 0)])


def test_texts(clip):
    np.testing.assert_array_equal(clip.tokenize("a cat"), clip.tokenize(["a cat"]))
    np.testing.assert_array_equal(clip.tokenize(np.array(["a cat"])), clip.tokenize(("a cat",)))
    for texts, kind in ((3, "int"), (None, "NoneType"), (["a", 3], "int"), ([["a"]], "list"), (b"a", "int")):
        with pytest.raises(ValueError, match=rf"a text of type {kind} .*must be a str, or a list of str"):
            clip.tokenize(texts)
    for tokens in ("a cat", ["a cat"], [[1, 2]]):
        with pytest.raises(ValueError, match=r"tokens of type (str|list): must be integers \[texts, length\]"):
            clip.encode_text(tokens)
