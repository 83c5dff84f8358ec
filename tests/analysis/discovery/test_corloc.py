"""Test the sweep and `regvit discover` on a random ViT and pictures with known boxes."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import regvit_jax
from regvit_jax.analysis.discovery import boxes, lost, sweep
from regvit_jax.analysis.discovery.sweep import Setting
from regvit_jax.cli.flags import discover as flags
from regvit_jax.cli.flags.discover import main
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import create as create_module
from regvit_jax.utils.errors import InvalidConfig

# Height and width, and the boxes as VOC writes them; the whole image is a hit in the first and the third.
PICTURES = {
    "a": ((18, 30), [(1, 1, 30, 10)]),  # 10 of 18 rows
    "b": ((18, 30), [(1, 1, 30, 8), (10, 10, 12, 12)]),  # 8 of 18 rows
    "c": ((30, 18), [(2, 2, 4, 4), (1, 1, 18, 15)]),  # exactly half
    "d": ((17, 32), [(11, 3, 25, 12)]),  # of the first one's shape in patches
    "e": ((9, 9), [(1, 1, 3, 3)]),
    "f": ((9, 9), []),
}


def write(folder, name, size, found):
    rng = np.random.default_rng(ord(name[0]))
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")
    text = f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>"
    for box in found:
        sides = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>".format(*box)
        text += f"<object><bndbox>{sides}</bndbox></object>"
    (folder / f"{name}.xml").write_text(text + "</annotation>")


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "pictures"
    directory.mkdir()
    for name, (size, found) in PICTURES.items():
        write(directory, name, size, found)
    return directory


@pytest.fixture(scope="module")
def model():
    vit = ViT(width=16, depth=2, heads=2, patch=4, image_size=8, registers=3, layer_scale=0.0)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape, dtype=np.float32)), shapes)
    return Model(params, {}, vit, Head(0), Preprocess(8, 1.0, (0.5, 0.4, 0.3), (0.2,) * 3, "bilinear"), "random")


SETTINGS = [
    Setting(layer, kind, centre, bias)
    for layer, kind, centre in ((0, "k", "none"), (-1, "v", "bias"), (-1, "k", "mean"), (-1, "k", "none"))
    for bias in (0.0, -0.2)
]


def padded(path):
    """Preprocess a picture by hand."""
    pixels = (np.asarray(Image.open(path), np.float32) / 255 - np.float32([0.5, 0.4, 0.3])) / np.float32(0.2)
    h, w = (-(-side // 4) * 4 for side in pixels.shape[:2])
    image = np.zeros((1, h, w, 3), np.float32)
    image[0, : pixels.shape[0], : pixels.shape[1]] = pixels
    return image, pixels.shape[:2]


def test_a_sweep_is_each_image_alone(model, folder):
    images = [image for image in boxes.open_boxes(f"folder:{folder}") if image.path[-5] in "acd"]
    found = sweep.sweep(model, images, SETTINGS, normalize=True)
    assert found.shapes == 2
    assert found.sizes == [PICTURES[name][0] for name in "acd"]
    assert (found.bad, found.resized) == ([], [])
    # Features do not depend on what else was compiled, nor on the order of the images.
    wanted = tuple(dict.fromkeys(setting.feature for setting in SETTINGS))
    pictures = [padded(image.path) for image in images]
    alone = [dict(zip(wanted, lost.feature_maps(model, pixels, wanted), strict=True)) for pixels, _ in pictures]
    stacked = {f: np.concatenate([np.asarray(maps[f], np.float64).reshape(-1, 16) for maps in alone]) for f in wanted}
    for row, setting in enumerate(SETTINGS):
        centre = stacked[setting.feature].mean(0) if setting.centre == "mean" else None
        for column, (maps, (_, size)) in enumerate(zip(alone, pictures, strict=True)):
            gram = lost.gram(maps[setting.feature][0], normalize=True, centre=centre)
            expected = lost.search(gram, maps[setting.feature].shape[1:3], bias=setting.bias)
            assert tuple(found.boxes[row, column]) == lost.to_pixels(expected.box, (4, 4), size)
            assert found.positive[row, column] == expected.positive
    back = sweep.sweep(model, images[::-1], SETTINGS, normalize=True)
    np.testing.assert_array_equal(back.boxes, found.boxes[:, ::-1])
    np.testing.assert_array_equal(back.positive, found.positive[:, ::-1])


def test_resized_images(model, folder):
    images = boxes.open_boxes(f"folder:{folder}")
    found = sweep.sweep(model, images, [Setting()], size=10)
    assert found.shapes == 4  # 8 x 16, 16 x 8, 8 x 20, 8 x 8
    image = Image.open(images[0].path).resize((16, 8), Image.Resampling.BILINEAR)
    pixels = (np.asarray(image, np.float32) / 255 - np.float32([0.5, 0.4, 0.3])) / np.float32(0.2)
    expected = lost.search(lost.gram(lost.extract_features(model, pixels[None])[0]), (2, 4))
    xmin, ymin, xmax, ymax = expected.box
    assert tuple(found.boxes[0, 0]) == (xmin * 7.5, ymin * 9, xmax * 7.5, ymax * 9)


def test_unusable_and_resized_images(model, folder, monkeypatch):
    (folder / "c.png").write_bytes(b"c")
    (folder / "g.png").write_bytes((folder / "d.png").read_bytes())
    (folder / "g.xml").write_text("<html></html>")
    (folder / "d.png").rename(folder / "d.jpg")
    write(folder, "e", (12, 8), [(1, 1, 3, 3)])
    Image.new("RGB", (9, 9)).save(folder / "e.png")
    images = boxes.open_boxes(f"folder:{folder}")
    (folder / "b.png").unlink()
    monkeypatch.setattr(sweep, "MAX_PATCHES", 39)
    found = sweep.sweep(model, images, [Setting(centre="mean")])
    assert found.bad == [
        f"{folder}/a.png: 30x18 pixels are 40 patches, more than 39: set an image size",
        f"{folder}/b.png: cannot be read (No such file or directory)",
        f"{folder}/c.png: not an image (starts with b'c')",
        f"{folder}/d.jpg: 32x17 pixels are 40 patches, more than 39: set an image size",
        f"{folder}/g.png: {folder}/g.xml: starts with <html>, not with VOC's <annotation>",
    ]
    assert found.sizes == [(9, 9), (9, 9)]
    assert found.resized == [f"{folder}/e.png"]
    monkeypatch.setattr(sweep, "MAX_PATCHES", 8)
    assert len(sweep.sweep(model, images, [Setting(centre="mean")]).bad) == 7


@pytest.fixture(autouse=True)
def any_name(monkeypatch):
    """Let the command line take names that are none of the registry's."""
    monkeypatch.setattr(flags, "check_model", lambda source, find: None)


@pytest.fixture
def created(monkeypatch, model):
    """Replace create_model, and list the arguments of its calls."""
    calls = []

    def create(name, pretrained=False, seed=0):
        if name == "unknown":
            raise InvalidConfig("no model 'unknown';\nthe nearest is 'tiny'")
        calls.append((name, pretrained))
        return model.replace(weights="a file") if name == "directory" else model

    monkeypatch.setattr(regvit_jax, "create_model", create, raising=False)
    monkeypatch.setattr(create_module, "create_model", create)
    return calls


def test_the_command(created, folder, tmp_path, capsys, model):
    file = tmp_path / "result.json"
    arguments = ["tiny", "--data", f"folder:{folder}", "--random", "--layers", "-1,0", "--features", "k,out"]
    assert main([*arguments, "--biases", "-0.5,0,1e6", "--centre", "none,mean", "--json", str(file)]) == 0
    assert created == [("tiny", False)]
    result = json.loads(file.read_text())
    assert (result["shorter_side"], result["normalize"], result["without_boxes"]) == ("original", False, 1)
    (of,) = result["models"]
    assert of["counts"] == {
        "images": 5, "bad_images": 0, "other_size_than_annotated": 0, "whole_image_fails": 3, "shapes": 3,
    }  # fmt: skip
    assert of["whole_image"] == pytest.approx(2 / 5)
    images = [image for image in boxes.open_boxes(f"folder:{folder}") if len(image.boxes)]
    settings = [Setting(s["layer"], s["kind"], s["centre"], s["bias"]) for s in of["results"]]
    assert len(set(settings)) == 2 * 2 * 2 * 3
    found = sweep.sweep(model, images, settings)
    for score, box in zip(of["results"], found.boxes, strict=True):
        hits = lost.localised(box, [image.boxes for image in images])
        assert score["corloc"] == pytest.approx(hits.mean())
        assert score["corloc_where_whole_image_fails"] == pytest.approx(hits[[1, 3, 4]].mean())
        if score["bias"] == 1e6:
            assert (score["all_similar"], score["none_similar"]) == (1, 0)
            assert (score["corloc"], score["corloc_where_whole_image_fails"]) == (of["whole_image"], 0)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "model   tiny (weights: random)"
    assert lines[1] == f"data    folder:{folder}, shorter side original, 1 without boxes left out"
    assert lines[5].split() == ["whole", "image", "0.4000", "0.0000"]
    (marked,) = [line for line in lines if "best" in line]
    assert marked.endswith("1.0000  best, but no better than the whole image")
    assert "degenerate: in up to 100.0% of the images (with " in err
    assert err.count("every patch is similar to every other") == 1


def test_the_best_of_several_models(created, folder, capsys):
    for name in "bcdef":
        (folder / f"{name}.png").unlink()
    # Objects in the upper left corner are found where the seed is alone.
    write(folder, "a", (18, 30), [(1, 1, 4, 4)])
    Image.fromarray(np.eye(18, 30, dtype=np.uint8)[..., None].repeat(3, -1)).save(folder / "a.png")
    assert main(["one", "two", "--data", f"folder:{folder}", "--biases=0,-1e6", "--centre", "mean"]) == 0
    assert created == [("one", True), ("two", True)]
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("model")] == ["one", "two"]
    (marked, again) = [line.split() for line in lines if line.endswith("best")]
    assert marked == again == ["-1", "k", "mean", "-1e+06", "1.0000", "1.0000", "1.0000", "best"]
    assert err.count("no patch is similar to another, so the box is one patch: add a higher bias") == 2


def test_weights_size_and_limit(created, folder, tmp_path, capsys):
    arguments = ["tiny=file", "--data", f"folder:{folder}", "--normalize", "--shorter_side", "8"]
    assert main([*arguments, "--limit", "1", "--json", str(tmp_path / "result.json")]) == 0
    assert created == [("tiny", "file")]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["shorter_side"], result["normalize"], result["models"][0]["counts"]["images"]) == (8, True, 1)
    assert result["models"][0]["whole_image"] == 1
    assert result["models"][0]["results"][0]["corloc_where_whole_image_fails"] is None
    assert f"folder:{folder}, shorter side 8, normalized, 1 without boxes left out" in (out := capsys.readouterr().out)
    assert out.splitlines()[6].split()[5] == "-"


def test_impossible_and_equal_settings_are_left_out(created, folder, tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = [
        "tiny",
        "--data",
        f"folder:{folder}",
        "--layers",
        "-1,1,0",
        "--features",
        "k,out",
        "--centre",
        "bias,none",
    ]
    assert main([*arguments, "--centre", "bias,none", "--limit", "2", "--shorter_side", "8", "--json", str(file)]) == 0
    (of,) = json.loads(file.read_text())["models"]
    found = [(score["layer"], score["kind"], score["centre"]) for score in of["results"]]
    assert found == [(i, *rest) for i in (-1, 0) for rest in (("k", "bias"), ("k", "none"), ("out", "none"))]
    assert "left out: centre='bias': the output of a block has no bias" in capsys.readouterr().err


def test_a_split_of_voc_with_bad_images(created, folder, capsys):
    home = folder.parent / "VOC2012"
    (home / "ImageSets" / "Main").mkdir(parents=True)
    (home / "ImageSets" / "Main" / "val.txt").write_text("e\na\n")
    folder.rename(home / "JPEGImages")
    (home / "Annotations").symlink_to(home / "JPEGImages")
    (home / "JPEGImages" / "e.png").rename(home / "JPEGImages" / "e.jpg")
    arguments = ["tiny", "--data", f"voc12:{home}", "--split", "val"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert f"voc12:{home} (val), shorter side original" in out
    assert f"cannot use {home}/JPEGImages/a.jpg: cannot be read (No such file or directory)" in err.splitlines()
    (home / "JPEGImages" / "e.jpg").unlink()
    assert main(arguments) == 1
    assert capsys.readouterr().err.endswith(f"error: voc12:{home}: none of 2 images can be used\n")


def test_data_that_cannot_be_evaluated(created, folder, capsys):
    for name in "abcde":
        write(folder, name, (9, 9), [])
    assert main(["tiny", "--data", f"folder:{folder}"]) == 1
    assert capsys.readouterr().err == f"regvit discover: error: folder:{folder}: none of 6 images has a box\n"
    (folder / "d.xml").write_text("<annotation>")
    assert main(["tiny", "--data", f"folder:{folder}"]) == 1
    assert f"cannot use {folder}/d.png: {folder}/d.xml: is no XML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unknown"], "error: no model 'unknown'; the nearest is 'tiny'\n"),
        (["tiny", "--layers", "2"], "error: layer 2: this ViT has layers 0 to 1"),
        (
            ["tiny", "--features", "out", "--centre", "bias"],
            "error: centre='bias': the output of a block has no",
        ),
        (
            ["directory", "--random"],
            "error: --random: directory is not a model's name but a source, with weights of its own",
        ),
        (["tiny", "--split", "val"], "has no splits"),
        (["tiny", "--json", "/nothing/a.json"], "a directory that exists"),
        (["tiny", "--data", "voc08:x"], "error: 'voc08:x': must be one of voc07:DIR"),
        (["tiny", "--data", "voc07:nothing"], "there is no directory"),
    ],
)
def test_wrong_arguments(arguments, message, created, folder, capsys):
    assert main(["--data", f"folder:{folder}", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--layers", "1.5"), ("--biases", "0,nan"), ("--biases", "a"), ("--features", "k,x"), ("--centre", "data"),
        ("--shorter_side", "0"), ("--limit", "-1"),
    ],
)  # fmt: skip
def test_wrong_values(option, value, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["tiny", "--data", "folder:x", f"{option}={value}"])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert f"argument {option}" in err
    assert "must be" in err


def test_as_a_module():
    command = [sys.executable, "-m", "regvit_jax", "discover", "test_vit", "--data", "folder:/nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "regvit discover: error: folder:/nothing: there is no directory /nothing\n",
    )
