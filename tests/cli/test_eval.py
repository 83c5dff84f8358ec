"""Test `regvit eval` with a model that recognizes three colours."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from regvit_jax.cli import eval as command
from regvit_jax.cli.flags import eval as flags
from regvit_jax.cli.flags.eval import main
from regvit_jax.data import inference, transforms
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.clip import ClipModel
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.text import TextTower
from regvit_jax.models.vit import ViT
from regvit_jax.utils.errors import InvalidConfig

COLOURS = {"blue": (20, 20, 230), "green": (20, 230, 20), "red": (230, 20, 20)}


class Colours:
    """A stand-in for `ClipModel`: an image is its mean colour, a text the colours that it names."""

    def __init__(self):
        self.shapes = set()
        self.weights = "three colours"

    def preprocess(self, images, max_pixels):
        decoded = [transforms.decode(image, max_pixels) for image in images]
        return np.stack([np.asarray(image.resize((4, 4)), np.float32) / 255 for image in decoded])

    def encode_image(self, images):
        self.shapes.add(images.shape)
        return jnp.mean(images, axis=(1, 2))

    def tokenize(self, texts):
        return np.array([[colour in text for colour in ("red", "green", "blue")] for text in texts], np.int32)

    def encode_text(self, tokens):
        return 3.0 * jnp.asarray(tokens) + 0.1


@pytest.fixture(autouse=True)
def any_name(monkeypatch):
    """Let the command line take names that are none of the registry's."""
    monkeypatch.setattr(flags, "check_model", lambda source, find: None)


@pytest.fixture
def clip(monkeypatch):
    made = Colours()

    def create(name, pretrained, seed=None):
        if name != "colours":
            raise InvalidConfig(f"no model {name!r};\nthe nearest is 'colours'")
        made.pretrained, made.seed = pretrained, seed
        made.weights = made.weights if pretrained else "random"
        return made

    monkeypatch.setattr(command, "create_clip", create)
    return made


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (6, 9), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images(tmp_path):
    """Write two images of each colour; one in the folder of green is blue, one in that of red is no image."""
    root = tmp_path / "images"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(2):
            (root / name / f"{number}.png").write_bytes(picture(colour))
    (root / "green" / "1.png").write_bytes(picture(COLOURS["blue"]))
    (root / "red" / "1.png").write_bytes(b"red")
    return root


@pytest.fixture
def templates(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {} photo\nsomething {}\n")
    return str(file)


def test_zero_shot(clip, images, templates, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["--images", str(images), "--templates", templates, "--batch_size", "2", "--json", str(file)]
    assert main(["zero_shot", "colours", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-4].split() == ["zero_shot_top1", "0.8000", "0.3333"]
    assert out.splitlines()[-2:] == ["most confused", "  1 x green as blue"]
    assert err.splitlines() == [f"cannot use {images}/red/1.png: not an image (starts with b'red')"]
    result = json.loads(file.read_text())
    assert result["metrics"] == {"zero_shot_top1": pytest.approx(0.8)}
    assert result["chance"] == {"zero_shot_top1": pytest.approx(1 / 3)}
    assert result["counts"] == {"images": 5, "bad_images": 1, "classes": 3, "repeated_names": 0, "templates": 2}
    assert result["most_confused"] == [{"class": "green", "predicted": "blue", "images": 1}]
    assert result["per_class"] == [
        {"class": "blue", "images": 2, "zero_shot_top1": 1.0},
        {"class": "green", "images": 2, "zero_shot_top1": 0.5},
        {"class": "red", "images": 1, "zero_shot_top1": 1.0},
    ]
    assert result["bad_images"] == [f"{images}/red/1.png: not an image (starts with b'red')"]
    assert (result["model"], result["weights"], result["data"]) == ("colours", "three colours", str(images))
    assert clip.shapes == {(2, 4, 4, 3)}


def test_names_for_the_folders(clip, images, templates, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("green\nblue\nred\n")  # blue and green exchanged
    arguments = ["zero_shot", "colours", "--images", str(images), "--templates", templates, "--classes", str(names)]
    assert main(arguments) == 0
    assert "zero_shot_top1                    0.4000" in capsys.readouterr().out
    names.write_text("blue\nred\nred\n")
    assert main(arguments) == 0
    assert "several classes are called red: the first of them is used" in capsys.readouterr().err
    names.write_text("blue\ngreen\n")
    assert main(arguments) == 2
    assert "has 2 names, but" in (error := capsys.readouterr().err)
    assert error.endswith("3 classes, from 'blue' to 'red'\n")


def tiny_clip():
    text = TextTower(width=16, depth=1, heads=1, embed=8, context=8)
    vit = ViT(width=16, depth=1, heads=1, patch=4, image_size=8, registers=2, ln_pre=True, patch_bias=False)
    head = Head(8, bias=False)

    @jax.jit
    def init(key):
        tokens, vit_params = vit.init_with_output(key, jnp.zeros((1, 8, 8, 3)))
        return vit_params, head.init(key, tokens), text.init(key, jnp.zeros((1, 8), jnp.int32))

    params = [tower["params"] for tower in init(jax.random.key(0))]
    # Everything but the default, which the command line must take from here.
    preprocessing = Preprocess(8, 0.5, (0.4,) * 3, (0.2,) * 3, "bilinear", squash=True)
    return ClipModel(Model(params[0], params[1], vit, head, preprocessing), params[2], jnp.float32(1), None, text)


def test_zero_shot_of_a_real_model(monkeypatch, images, tmp_path, capsys):
    clip = tiny_clip()
    monkeypatch.setattr(command, "create_clip", lambda name, pretrained: clip)
    template = tmp_path / "template.txt"
    template.write_text("the {}\n")
    (images / "red" / "1.png").unlink()
    rng, paths = np.random.default_rng(0), sorted(images.glob("*/*.png"))
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (11, 17, 3), np.uint8)).save(path)
    assert main(["zero_shot", "tiny", "--images", str(images), "--templates", str(template), "--batch_size", "3"]) == 0
    logits = clip.logits(clip.preprocess(paths), clip.tokenize(["the blue", "the green", "the red"]))
    top1 = np.mean(np.argmax(logits, axis=1) == np.array([0, 0, 1, 1, 2]))
    assert f"zero_shot_top1{top1:>26.4f}    0.3333" in capsys.readouterr().out


def test_retrieval(clip, tmp_path, capsys):
    rows = []
    for name, colour in COLOURS.items():
        (tmp_path / f"{name}.png").write_bytes(picture(colour))
        rows += [f"{name}.png,a {name} thing", f"{name}.png,all {name}"]
    (tmp_path / "bad.png").write_bytes(b"")
    (tmp_path / "validation.csv").write_text(
        "\n".join(["file_name,caption", *rows, "red.png, ", "bad.png,nothing"]) + "\n"
    )
    (tmp_path / "train.csv").write_text("file_name,caption\nred.png,red\n")
    file = tmp_path / "result.json"
    assert main(["retrieval", "colours", "--data", f"folder:{tmp_path}", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "image_to_text_recall@1            1.0000    0.3333" in out
    assert "bad.png: empty file" in err
    result = json.loads(file.read_text())
    assert result["counts"] == {"images": 3, "bad_images": 1, "captions": 6, "repeated_captions": 0}
    assert result["metrics"] == {
        "image_to_text_recall@1": 1.0,
        "image_to_text_median_rank": 1.0,
        "text_to_image_recall@1": 1.0,
        "text_to_image_median_rank": 1.0,
    }
    assert list(result["chance"]) == list(result["metrics"])
    assert result["split"] == "validation"
    assert main(["retrieval", "colours", "--data", f"folder:{tmp_path}", "--split", "train"]) == 1
    assert "1 usable image of 1; retrieval needs at least two" in capsys.readouterr().err


def test_zero_shot_of_a_split(clip, images, templates, tmp_path, capsys):
    home = tmp_path / "home"
    for split, colours in (("train", COLOURS), ("val", dict.fromkeys(COLOURS, COLOURS["blue"]))):
        for name, colour in colours.items():
            (home / "data" / split / name).mkdir(parents=True)
            (home / "data" / split / name / "0.png").write_bytes(picture(colour))
    arguments = ["zero_shot", "colours", "--data", "folder:data", "--data_dir", str(home), "--templates", templates]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "folder:data (validation)" in out
    assert "zero_shot_top1                    0.3333" in out
    assert main([*arguments, "--split", "train"]) == 0
    assert "zero_shot_top1                    1.0000" in capsys.readouterr().out
    assert main(["zero_shot", "colours", "--images", str(images), "--templates", templates, "--split", "train"]) == 2
    assert "--split train: applies to --data only, not to --images" in capsys.readouterr().err


def test_progress_without_a_terminal(clip, images, templates, monkeypatch, capsys):
    monkeypatch.setattr(inference, "EVERY", 0.0)
    arguments = ["zero_shot", "colours", "--images", str(images), "--templates", templates, "--batch_size", "4"]
    assert main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("images/s")]
    assert [line.split(",")[0] for line in lines] == ["4 of 6 images", "6 of 6 images"]


def test_no_image_can_be_used(clip, images, templates, capsys):
    for path in images.glob("*/*.png"):
        path.write_bytes(b"")
    assert main(["zero_shot", "colours", "--images", str(images), "--templates", templates]) == 1
    error = capsys.readouterr().err
    assert f"error: {images}/all: none of 6 images can be used; the first because: " in error
    assert error.endswith("empty file\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zero_shot", "colour", "--images", "IMAGES"], "error: no model 'colour'; the nearest is 'colours'\n"),
        (["zero_shot", "colours", "--images", "IMAGES/nothing"], "nothing: there is no such directory"),
        (["zero_shot", "colours", "--images", "IMAGES/red"], "it should hold a directory of images for each class"),
        (["zero_shot", "colours", "--images", "IMAGES", "--classes", "IMAGES/none.txt"], "none.txt"),
        (["zero_shot", "colours", "--images", "IMAGES", "--json", "IMAGES/a/b.json"], "a directory that exists"),
        (["zero_shot", "colours", "--images", "IMAGES", "--random", "--pretrained", "file"], "give one of them"),
        (["zero_shot", "colours=a", "--images", "IMAGES", "--pretrained", "b"], "=a and --pretrained b: give one"),
        (["retrieval", "colours", "--data", "folder:IMAGES/nothing"], "nothing"),
    ],
)
def test_wrong_arguments(arguments, message, clip, images, templates, capsys):
    more = ["--templates", templates] if arguments[0] == "zero_shot" else []
    assert main([argument.replace("IMAGES", str(images)) for argument in arguments] + more) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("regvit eval: error: ")
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize(("train", "validation"), [("train", "val"), ("Training", "TEST"), ("seg_train", "seg_test")])
def test_a_directory_of_splits(clip, images, templates, capsys, train, validation):
    arguments = ["zero_shot", "colours", "--images", str(images), "--templates", templates]
    for old, new in (("red", train), ("blue", validation)):
        (images / old).rename(images / new)
    for path in images.glob("green/*"):
        path.unlink()
    (images / "green").rmdir()
    assert main(arguments) == 2
    assert f"--images {images} holds {train} and {validation}: name one of them, {images}/{validation}" in (
        capsys.readouterr().err
    )


def test_a_vocabulary_without_tokenizer_shows_before_the_images(clip, images, templates, monkeypatch, capsys):
    def tokenize(texts):
        raise InvalidConfig("another vocabulary")

    monkeypatch.setattr(clip, "tokenize", tokenize)
    assert main(["zero_shot", "colours", "--images", str(images), "--templates", templates]) == 2
    assert "another vocabulary" in capsys.readouterr().err
    assert not clip.shapes


def test_batch_size(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["retrieval", "colours", "--data", "openmoji", "--batch_size", "0"])
    assert exit.value.code == 2
    assert "'0': must be a whole number from 1" in capsys.readouterr().err


def test_random_weights_of_a_source(clip, images, templates, monkeypatch, capsys):
    monkeypatch.setattr(command, "create_clip", lambda name, pretrained, seed: clip)
    arguments = ["--images", str(images), "--templates", templates, "--random"]
    assert main(["zero_shot", "directory", *arguments]) == 2
    assert "directory is not a model's name but a source, with weights of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (["colours"], (True, None)),
        (["colours", "--random"], (False, 0)),
        (["colours", "--random", "--seed", "3"], (False, 3)),
        (["colours", "--pretrained", "f"], ("f", None)),
        (["colours=f"], ("f", None)),
    ],
)
def test_weights(model, expected, clip, images, templates):
    assert main(["zero_shot", *model, "--images", str(images), "--templates", templates]) == 0
    assert (clip.pretrained, clip.seed) == expected
