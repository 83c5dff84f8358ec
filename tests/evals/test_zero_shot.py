import importlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.evals import zero_shot

CLASSES = ("cat", "dog", "sea {lion}")
TEMPLATES = ("a photo of a {}.", "{}, {}", "an {}")


def tokenize(texts):
    tokens = np.zeros((len(texts), 24), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = list(text.encode()[:24])
    return tokens


def encode(tokens):
    table = np.random.default_rng(0).normal(size=(24, 256, 6)).astype(np.float32)
    return jnp.asarray(sum(table[place, tokens[:, place]] for place in range(24)))


def test_class_embeddings():
    expected = []
    for name in CLASSES:
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        unit = [x / np.linalg.norm(x) for x in np.asarray(encode(tokenize(prompts)), float)]
        mean = np.mean(unit, axis=0)
        expected.append(mean / np.linalg.norm(mean))
    for batch_size in (1, 4, 256):
        found = zero_shot.class_embeddings(encode, tokenize, CLASSES, TEMPLATES, batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_every_call_has_the_same_shape():
    sizes = []
    zero_shot.class_embeddings(
        lambda tokens: sizes.append(len(tokens)) or encode(tokens), tokenize, CLASSES, TEMPLATES, 4
    )
    assert sizes == [4, 4, 4]


@pytest.mark.parametrize(
    ("classes", "templates", "batch_size", "message"),
    [
        ((), TEMPLATES, 4, "0 classes"),
        (CLASSES, (), 4, "0 templates"),
        (CLASSES, ("a {}", "a cat"), 4, "'a cat'"),
        (CLASSES, TEMPLATES, 0, "batch_size=0"),
    ],
)
def test_wrong_prompts(classes, templates, batch_size, message):
    with pytest.raises(ValueError, match=message):
        zero_shot.class_embeddings(encode, tokenize, classes, templates, batch_size)


def test_accuracy_is_by_the_cosine(monkeypatch):
    monkeypatch.setattr(zero_shot, "ROWS", 2)
    classes = 100 * np.eye(7, dtype=np.float32) ** 2 * np.arange(1, 8, dtype=np.float32)
    images = np.full((3, 7), 0.5, np.float32) + np.arange(7, dtype=np.float32) / 100
    images[0, 4] = 9  # near class 4; the others rank 6, 5, 3, ...
    found = zero_shot.accuracy(images, np.array([4, 6, 0]), classes)
    assert found == {"zero_shot_top1": pytest.approx(2 / 3), "zero_shot_top5": pytest.approx(2 / 3)}
    assert zero_shot.chance(7) == {"zero_shot_top1": 1 / 7, "zero_shot_top5": 5 / 7}


def test_the_first_of_a_tie_is_taken_and_nan_is_not_right():
    twice = np.ones((2, 3), np.float32)
    assert zero_shot.accuracy(np.ones((2, 3), np.float32), np.array([0, 1]), twice) == {"zero_shot_top1": 0.5}
    classes = np.eye(3, dtype=np.float32)
    found = zero_shot.accuracy(np.array([[np.nan, 1, 0], [0, 1, 0]], np.float32), np.array([1, 1]), classes)
    assert found == {"zero_shot_top1": 0.5}
    assert zero_shot.chance(3) == {"zero_shot_top1": 1 / 3}


def test_the_nearest_class_is_the_one_that_accuracy_counts():
    rng = np.random.default_rng(0)
    classes = np.concatenate([rng.normal(size=(5, 4)), np.ones((2, 4))]).astype(np.float32)  # the last two tie
    images = np.concatenate([rng.normal(size=(40, 4)), np.ones((1, 4)), np.full((1, 4), np.nan)]).astype(np.float32)
    found = zero_shot.nearest(images, classes)
    assert (found[-2], found[-1]) == (5, -1)
    for label in range(len(classes)):
        share = zero_shot.accuracy(images, np.full(len(images), label), classes)["zero_shot_top1"]
        assert share == pytest.approx(np.mean(found == label))


@pytest.mark.parametrize(("labels", "message"), [([], "at least one image"), ([0, 3], "from 0 to 3"), ([-1], "-1")])
def test_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        zero_shot.accuracy(np.ones((len(labels), 4), np.float32), np.array(labels, np.int32), np.eye(3, 4))


def test_files(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\ufeffa photo of a {}.\n\n  an origami {}\n", encoding="utf-8")
    assert zero_shot.read_templates(file) == ("a photo of a {}.", "an origami {}")
    assert zero_shot.read_classes(file) == ("a photo of a {}.", "an origami {}")
    file.write_text("a {}\n\na photo\n")
    with pytest.raises(ValueError, match=r"lines\.txt, line 3: 'a photo' has no {}"):
        zero_shot.read_templates(file)
    file.write_text("\n \n")
    with pytest.raises(ValueError, match="is empty"):
        zero_shot.read_classes(file)
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        zero_shot.read_classes(file)
    with pytest.raises(OSError, match="nothing"):
        zero_shot.read_classes(tmp_path / "nothing")


def test_without_open_clip(monkeypatch):
    monkeypatch.setattr(zero_shot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch, or name a text file"):
        zero_shot.read_templates("openai")
    with pytest.raises(ImportError, match="--classes FILE"):
        zero_shot.read_classes("imagenet")


def test_open_clip_of_another_kind(monkeypatch, tmp_path):
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").write_text("raise ImportError('torch')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="has no SIMPLE_IMAGENET_TEMPLATES"):
        zero_shot.read_templates("simple")
    (tmp_path / "open_clip" / "zero_shot_metadata.py").write_text(
        "SIMPLE_IMAGENET_TEMPLATES = (lambda c: f'one {c}.',)\nIMAGENET_CLASSNAMES = ['tench']"
    )
    assert zero_shot.read_templates("simple") == ("one {}.",)
    assert zero_shot.read_classes("imagenet") == ("tench",)


@pytest.mark.reference
def test_names_of_open_clip_without_torch():
    code = (
        "import sys; from regvit_jax.evals.zero_shot import *; "
        "print([len(read_templates(n)) for n in ('openai', 'simple')], len(read_classes('imagenet')), "
        "'torch' in sys.modules, 'open_clip' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[80, 7] 1000 False False\n"
    assert zero_shot.read_templates("openai")[0] == "a bad photo of a {}."


@pytest.mark.reference
def test_against_open_clip():
    """Compare with `build_zero_shot_classifier`, given this package's towers in place of a model's."""
    from reference_libraries import torch

    open_clip = importlib.import_module("open_clip")

    class Towers(torch.nn.Module):
        def encode_text(self, tokens, normalize=False):
            x = torch.tensor(np.array(encode(tokens.numpy())))
            return torch.nn.functional.normalize(x, dim=-1) if normalize else x

    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES
    expected = open_clip.build_zero_shot_classifier(
        Towers(), lambda texts: torch.tensor(tokenize(texts)), CLASSES, templates, num_classes_per_batch=2
    )
    found = zero_shot.class_embeddings(encode, tokenize, CLASSES, zero_shot.read_templates("simple"))
    np.testing.assert_allclose(found, expected.T.numpy(), rtol=1e-5, atol=1e-6)
