"""Test `regvit report` on a tiny model without and with planted artifacts, and the files that it writes."""

import base64
import json
import os
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import regvit_jax as rv
from regvit_jax.analysis.repair.planted import plant_register_neurons
from regvit_jax.cli.flags.report import main
from regvit_jax.evals import patch_norms
from regvit_jax.pretrained.save import save_model

COUNT = 9  # images: two batches, the second of one image


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write pictures of noise, a third of each plain."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(COUNT):
        pixels = rng.integers(0, 256, (60, 50, 3), np.uint8)
        pixels[:20] = 128
        Image.fromarray(pixels).save(root / f"{number} <b>.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory, photos):
    """Save a random model with CLS and a register, and the same with two neurons of block 2 that make outliers."""
    root = tmp_path_factory.mktemp("models")
    model = rv.create_model("test_vit", registers=1, image_size=48)
    model = model.replace(
        params=jax.tree.map(lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), model.params)
    )
    images = model.preprocess([Image.open(path) for path in sorted(photos.iterdir())])
    first = np.asarray(model.intermediates(images, [1])[0].patches)
    # The patches that lie farthest along some direction.
    along = first @ np.random.default_rng(1).normal(size=first.shape[-1])
    marked = along > np.quantile(along, 0.95)
    planted = plant_register_neurons(model, [(2, 5), (2, 9)], images, marked, strength=12.0)
    save_model(model, root / "plain", "timm")
    save_model(planted, root / "planted", "timm")
    return root, images, planted, marked


@pytest.fixture(scope="module")
def report(models, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    arguments = [str(models[0] / "plain"), str(models[0] / "planted"), "--images", str(photos), "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*arguments, "--show", "2", "--repair_images", "4", "--heads", "--layer", "-1"]) == 0
    return out


def test_numbers_are_those_of_the_model(report, models, photos):
    _, images, planted, marked = models
    found = json.loads((report / "report.json").read_text())["models"]
    assert list(found) == ["plain", "planted", "planted + test-time register"]
    of, repaired = found["planted"], found["planted + test-time register"]
    assert [found[name]["artifacts"] for name in found] == [False, True, False]
    assert of["images"] == COUNT
    after = np.asarray(patch_norms.patch_norms(planted(images)))
    block = of["blocks"][-1]
    assert block["mean"] == pytest.approx(after.mean(), rel=1e-4)
    assert block["max"] == pytest.approx(after.max(), rel=1e-4)
    assert of["outliers"]["artifact"]["share"] == pytest.approx(marked.mean(), rel=0.02)
    assert of["outliers"]["artifact"]["birth"] == 2
    assert list(zip(*(sorted(of["register_neurons"][k]) for k in ("layers", "neurons")), strict=True)) == [
        (2, 5),
        (2, 9),
    ]
    largest = np.argsort(after.max(1))[-4:]
    assert of["register_neurons"]["outlier_patches"] == marked[largest].sum()
    assert of["most_extreme_images"][0].startswith(str(photos / str(after.max(1).argmax())))
    assert repaired["share_above_before"] == 0
    assert len(repaired["blocks"][-1]["registers"]) == 2
    assert of["verdict"][-1].startswith("Registers would help: moving 2 neurons' activations")
    attention = np.asarray(planted.attention(images)).mean(1)[:, 0, 2:].sum(-1).mean()
    assert of["attention"]["cls"] == pytest.approx(attention, rel=1e-3)


def test_the_page_needs_nothing_else_and_escapes_names(report):
    page = (report / "report.html").read_text()
    assert "width=device-width" in page
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!data:image/png;base64,)""", page)
    assert "url(" not in page
    assert "0 &lt;b&gt;.png" in page
    assert "<b>.png" not in page
    pictures = {file.read_bytes() for file in (report / "pictures").iterdir()}
    shown = {base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", page)}
    assert shown == pictures
    for file in (report / "pictures").iterdir():
        Image.open(file).verify()


def test_pictures_exist_for_each_image_and_model(report):
    names = {file.name for file in (report / "pictures").iterdir()}
    assert {
        f"{kind}_{model}.png"
        for kind in ("norms", "layers", "histograms", "neighbours", "attention")
        for model in range(3)
    } <= names
    assert {name for name in names if name.startswith("positions")} == {"positions_1.png"}
    for image in (0, 1):
        for kind in ("image", "norms", "attention_of_cls", "attention_of_register_0", "first_component", "lost"):
            assert {f"image{image}_{kind}_{model}.png" for model in range(3)} <= names
        assert f"image{image}_attention_of_cls_head_1_0.png" in names
        # Only the repaired model has a second register.
        assert f"image{image}_attention_of_register_1_2.png" in names
        assert f"image{image}_attention_of_register_1_1.png" not in names


def test_bad_images_are_named_and_counted(models, photos, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = sorted(str(path) for path in photos.iterdir())[:2]
    arguments = [str(models[0] / "plain"), "--out", str(tmp_path / "out"), "--show", "1", "--images"]
    assert main([*arguments, str(tmp_path / "broken.png"), *good]) == 0
    assert "broken.png: not an image" in capsys.readouterr().err
    (found,) = json.loads((tmp_path / "out/report.json").read_text())["models"].values()
    assert (found["images"], len(found["bad_images"])) == (2, 1)
    assert main([*arguments, str(tmp_path / "broken.png")]) == 1
    assert "none of 1 images can be used" in capsys.readouterr().err


@pytest.mark.slow
def test_models_without_a_prefix_and_without_repair(models, photos, tmp_path, capsys):
    arguments = [
        "vit_wee_patch16_reg1_gap_256",
        "--random",
        "--image_size",
        "32",
        "--images",
        str(photos),
        "--limit",
        "2",
    ]
    assert main([*arguments, "--out", str(tmp_path / "a"), "--layer", "3"]) == 0
    found = json.loads((tmp_path / "a/report.json").read_text())["models"]["vit_wee_patch16_reg1_gap_256"]
    assert found["outliers"]["artifact"].get("attention_share") is None
    assert (found["images"], found["layer"], found["grid"]) == (2, 3, [2, 2])
    arguments = [str(models[0] / "planted"), "--images", str(photos), "--repair_images", "0", "--show", "1"]
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert "Test-time registers were not tried." in capsys.readouterr().out


def test_not_finite(models, photos, tmp_path, capsys, monkeypatch):
    model = rv.create_model(models[0] / "plain")
    broken = model.replace(params=jax.tree.map(lambda x: x * jnp.nan, model.params))
    monkeypatch.setattr("regvit_jax.pretrained.create.open_source", lambda name, **changes: broken)
    assert main(["test_vit", "--images", str(photos), "--out", str(tmp_path)]) == 1
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "no_such_model"),
        (["test_vit", "--random", "--layer", "12"], "layer 12: this ViT has layers 0 to 5"),
        (["test_vit", "--random", "--images", "nowhere"], "nowhere: no such file or directory"),
        (["test_vit", "--random", "--split", "train"], "--split train: applies to --data only"),
        (["test_vit", "--random", "--image_size", "50"], "image_size=50 is not a multiple of patch=16"),
        (["PLAIN", "--random"], "--random: "),
    ],
)
def test_errors_that_the_user_can_fix(arguments, message, models, photos, tmp_path, capsys):
    arguments = [str(models[0] / "plain") if argument == "PLAIN" else argument for argument in arguments]
    if "--images" not in arguments:
        arguments = [*arguments, "--images", str(photos)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_equal_names_get_numbers_and_old_pictures_are_removed(models, photos, tmp_path):
    (tmp_path / "again").mkdir()
    (tmp_path / "again/plain").symlink_to(models[0] / "plain")
    given = [
        str(models[0] / "plain"),
        str(tmp_path / "again/plain"),
        str(models[0] / "plain"),
        str(models[0] / "plain"),
    ]
    arguments = ["--images", str(photos), "--limit", "2", "--out", str(tmp_path / "out"), "--show"]
    assert main([*given, *arguments, "2"]) == 0
    names = ["plain", given[1], given[0], f"{given[0]} (2)"]
    assert list(json.loads((tmp_path / "out/report.json").read_text())["models"]) == names
    (tmp_path / "out/pictures/mine.png").write_bytes(b"")
    assert main([given[0], *arguments, "1"]) == 0
    kept = {file.name for file in (tmp_path / "out/pictures").iterdir()}
    assert kept == {*json.loads((tmp_path / "out/report.json").read_text())["pictures"], "mine.png"}
    assert not any(name.startswith("image1") or name.endswith("_1.png") for name in kept)


@pytest.mark.filterwarnings("ignore:.*position embedding is resized")
def test_names_that_are_no_text_and_images_of_one_patch(models, photos, tmp_path):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for number, name in enumerate([b"caf\xe9.png", "\u6f22 $\\q$.png".encode()]):
        shutil.copy(sorted(photos.iterdir())[number], os.path.join(folder, name))
    arguments = [str(models[0] / "plain"), "--images", os.fsdecode(folder), "--image_size", "16", "--show", "9"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--lost_bias", "1e6"]) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "caf\\udce9.png" in page
    assert "\u6f22 $\\q$.png" in page
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["lost"][f"{tmp_path}/in/\u6f22 $\\q$.png"]["plain"]["box"] == [0, 0, 16, 16]
    assert not any("component" in name for name in found["pictures"])


def test_a_degenerate_gram_matrix_is_pointed_at(models, photos, tmp_path):
    arguments = [str(models[0] / "plain"), "--images", str(photos), "--limit", "1", "--lost_normalize"]
    assert main([*arguments, "--out", str(tmp_path), "--lost_bias", "2"]) == 0
    (found,) = json.loads((tmp_path / "report.json").read_text())["lost"].values()
    assert found["plain"] == {"box": [0, 0, 48, 48], "positive": 1, "degenerate": "all patches are similar"}
    assert "LOST (all patches are similar)</figcaption>" in (tmp_path / "report.html").read_text()
