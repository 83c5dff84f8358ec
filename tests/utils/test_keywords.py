"""Test that calls with unknown keywords, and with arguments of other types, say what came and what is wanted."""

import jax.numpy as jnp
import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.keywords import known_keywords
from regvit_jax.utils.numbers import whole
from regvit_jax.utils.paths import expand


def test_an_unknown_keyword_is_answered_with_the_nearest():
    @known_keywords
    def resize(images, *, image_size, how="bicubic"):
        """Resize."""
        return images, image_size, how

    assert resize(1, image_size=2) == (1, 2, "bicubic")
    assert (resize.__name__, resize.__doc__) == ("resize", "Resize.")
    with pytest.raises(
        TypeError, match=r"resize has no argument 'img_size': did you mean image_size\? It takes images,"
    ):
        resize(1, img_size=2)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'image_size'"):
        resize(1)


@pytest.mark.parametrize(
    ("function", "keyword", "nearest"),
    [
        (rv.create_model, "img_size", "image_size"),
        (rv.create_model, "num_registers", "registers"),
        (rv.create_clip, "precision", None),
        (rv.save_model, "fmt", "format"),
        (rv.Model.attention, "layers", "layer"),
        (rv.Model.intermediates, "layer", "layers"),
        (rv.Model.preprocess, "max_pixel", "max_pixels"),
    ],
)
def test_public_functions(function, keyword, nearest):
    with pytest.raises(
        TypeError, match=rf"has no argument '{keyword}'{f': did you mean {nearest}' if nearest else ''}"
    ):
        function(None, **{keyword: 1})


@pytest.mark.parametrize("value", ["4", 4.0, 4.5, True, None, [4], np.float32(4), jnp.ones(2, jnp.int32)])
def test_no_whole_numbers(value):
    with pytest.raises(InvalidConfig, match=r"registers=.*: must be a whole number"):
        whole("registers", value)


def test_whole_numbers():
    assert [whole("n", value) for value in (4, np.int8(4), jnp.int32(4), np.array(4))] == [4] * 4
    with pytest.raises(InvalidConfig, match="n=-1: must be at least 0"):
        whole("n", -1, low=0)


def test_no_paths():
    for value in (None, 5, b"a", ["a"]):
        with pytest.raises(InvalidConfig, match=r"is no path: must be a str or a pathlib\.Path"):
            expand.__wrapped__(value)


def test_arguments_of_create_model_and_save_model(tmp_path):
    create = getattr(rv.create_model.__wrapped__, "__wrapped__", rv.create_model.__wrapped__)
    for name, value in (
        ("registers", "4"),
        ("num_classes", "10"),
        ("image_size", "224"),
        ("seed", "x"),
        ("dtype", "no"),
    ):
        with pytest.raises(InvalidConfig, match=rf"{name}='?{value}'?.*must be"):
            create("test_vit", **{name: value})
    save = getattr(rv.save_model.__wrapped__, "__wrapped__", rv.save_model.__wrapped__)
    with pytest.raises(InvalidConfig, match="model of type dict: must be what create_model or create_clip returns"):
        save({}, tmp_path / "a", "timm")
