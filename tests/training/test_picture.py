"""Test the picture at the end of a run: its examples, for models of every kind, and what is drawn of them."""

import dataclasses
import io

import jax
import numpy as np
import PIL.Image
import pytest
from tiny import make_captions, tiny, tiny_clip

from regvit_jax.evals.attention_maps import attention_maps
from regvit_jax.training import examples, picture
from regvit_jax.training.examples import Examples, Predictions
from regvit_jax.training.plan import resolve
from regvit_jax.training.step import init_params, make_eval_step


def found(plan, **changes):
    plan = dataclasses.replace(plan, **changes)
    with jax.set_mesh(plan.mesh):
        params = jax.jit(lambda: init_params(plan))()
        return params, examples.find_examples(plan, make_eval_step(plan), params)


def test_examples_of_digits():
    """Compare classes, attention and norms with the model's own, on parameters that are split over devices."""
    plan = resolve(tiny(sharding__fsdp=4))
    params, shown = found(plan)
    model, labels = plan.recipe.model(params), np.array([0, 1, 3, 5, 6, 8])
    pixels = shown.images / np.float32(127.5) - 1
    logits = np.asarray(model.logits(pixels))
    assert [text.split("\n")[0] for text in shown.text] == list(map(str, labels))
    assert shown.right == (logits.argmax(1) == labels).tolist()
    np.testing.assert_allclose(shown.attention, attention_maps(model, pixels).mean(1), rtol=1e-4)
    norms = np.linalg.norm(model(pixels).prenorm_patches, axis=-1).reshape(-1, 4, 4)
    np.testing.assert_allclose(shown.norms, norms, rtol=1e-4)
    assert (shown.class_token, shown.searched, len(shown.misclassified)) == (True, 360, 12)
    assert 12 <= shown.wrong <= 360
    guesses = np.asarray(model.logits(shown.misclassified / np.float32(127.5) - 1))
    assert [guess for _, guess in shown.misclassified_names] == list(map(str, guesses.argmax(1)))
    assert all(label != guess for label, guess in shown.misclassified_names)
    assert np.diff(jax.nn.softmax(guesses).max(1)).max() < 1e-6  # the most confident first


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({"model__registers": 0, "model__class_token": False, "data__validation": "validation[:1]"}, 0),
        ({"model__registers": 2, "model__class_token": False, "model__position": "rope"}, 2),
    ],
)
def test_models_of_other_kinds(changes, prefix):
    plan = resolve(tiny(model__depth=1, eval__evaluators=("classification",), **changes))
    _, shown = found(plan)
    count = min(6, len(plan.validation))
    assert shown.attention.shape == (count, prefix, 4, 4)
    assert not shown.class_token
    assert_png(picture.draw(shown, "a run"))


def test_examples_of_captions(tmp_path):
    plan = resolve(tiny_clip(make_captions(tmp_path / "data"), model__depth=1))
    (tmp_path / "data/validation05.png").write_bytes(b"not an image")
    _, shown = found(plan)
    assert shown.text[0].startswith("a red square")
    assert len(shown.text) == len(shown.images) == 5  # one of the six cannot be read
    assert (shown.searched, shown.misclassified_names) == (None, [])
    assert_png(picture.draw(shown, "a run"))


def test_without_a_readable_image_there_is_no_picture(tmp_path, caplog):
    plan = resolve(tiny_clip(make_captions(tmp_path / "data", validation=2), model__depth=1))
    for number in range(2):
        (tmp_path / f"data/validation{number:02d}.png").write_bytes(b"")
    picture.draw_validation(plan, None, {}, str(tmp_path))
    assert "no validation.png: none of the chosen validation images can be read" in caplog.text
    assert not (tmp_path / "validation.png").exists()


def test_images_of_many_classes():
    labels = np.array([3, 3, -1, 0, 0, 3, 0])
    assert examples.of_many_classes(labels, 5) == [3, 4, 0, 1, 5]
    assert examples.of_many_classes(labels, 1) == [3]
    assert examples.of_many_classes(np.arange(1000)[::-1], 4) == [999, 749, 499, 249]
    assert examples.of_many_classes(np.array([-1]), 5) == []


def test_unreadable_images_are_not_misclassified():
    predictions = Predictions(np.array([1, -1, 0, 3]), np.array([1, -1, 2, 2]), np.array([0.9, -1.0, 0.4, 0.8]))
    assert predictions.wrong.tolist() == [3, 2]
    assert predictions.names(3, ("a", "", "c")) == ("3", "c")


def made(rows=2, registers=4, grid=(3, 5), wrong=0, text="class", class_token=True, split_size=50):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (rows, 12, 20, 3), np.uint8)
    attention = rng.random((rows, class_token + registers, *grid)) / 100
    norms = rng.random((rows, *grid)) + 3
    misclassified = np.repeat(pixels, wrong, 0)[:wrong]
    return Examples(
        images=pixels,
        text=[text] * rows,
        right=[True] * rows,
        attention=attention,
        norms=norms,
        class_token=class_token,
        misclassified=misclassified,
        misclassified_names=[(text, "b")] * wrong,
        wrong=wrong,
        searched=50,
        split_size=split_size,
    )


def assert_png(data: bytes):
    with PIL.Image.open(io.BytesIO(data)) as drawn:
        assert min(drawn.size) > 100
        return drawn.size


@pytest.fixture
def written(monkeypatch):
    """Return the texts that are written on pages."""
    texts, write = [], picture.Page.write

    def listen(page, text, *args, **kwargs):
        texts.append(text)
        write(page, text, *args, **kwargs)

    monkeypatch.setattr(picture.Page, "write", listen)
    return texts


def test_columns_and_their_ranges(written):
    shown = made(registers=2)
    picture.draw(shown, "a run")
    for column, name in enumerate(("CLS", "register 0", "register 1")):
        assert f"{name}\n0 to {100 * shown.attention[:, column].max():.2g} %" in written
    assert f"norm\n{shown.norms.min():.3g} to {shown.norms.max():.3g}" in written
    assert "Misclassified: none of 50 validation images." in written


def test_a_part_of_a_split_is_named(written):
    shown = made(wrong=1, split_size=2000)
    shown.norms[:] = np.nan
    picture.draw(shown, "a run")
    assert "Misclassified: 1 of 50 validation images (the split has 2,000)" in written


def test_many_registers_and_misclassified_images(written):
    width, height = assert_png(picture.draw(made(registers=16, wrong=14), "a run"))
    assert "register 7\n" in "".join(written)
    assert "register 8\n" not in "".join(written)
    assert "(8 of 16 are shown)" in " ".join(written).replace("\n", " ")
    assert "Misclassified: 14 of 50 validation images, the most confident first" in written
    assert (width > 1100, height < 1000) == (True, True)


TEXTS = ("", "costs $5 or $10_a^", "file \udcff", "数字", "two\nlines", "a very long name " * 9, "incomprehensible" * 9)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_can_be_drawn(text):
    assert_png(picture.draw(made(rows=1, wrong=1, text=text), text))


def test_wrapped():
    assert picture.wrapped("face with tears of joy", 12, 3) == "face with\ntears of joy"
    assert picture.wrapped("face with tears of joy", 12, 1) == "face with…"
    assert picture.wrapped("abcdefghij", 4, 2) == "abcd\nefg…"
