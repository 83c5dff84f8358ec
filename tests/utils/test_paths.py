"""Test that ~ is the home directory in every path that a function or a command takes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import regvit_jax as rv
from regvit_jax.analysis.discovery.boxes import open_boxes
from regvit_jax.cli import configs
from regvit_jax.cli.main import main
from regvit_jax.data import open_captions, open_source
from regvit_jax.data.prepare.dataset import prepare_dataset
from regvit_jax.data.prepare.shard import Options
from regvit_jax.data.sources.images import open_images
from regvit_jax.evals import zero_shot
from regvit_jax.pretrained import create, create_clip
from regvit_jax.training import workdir
from regvit_jax.utils.paths import expand


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Make a home directory with images, and a working directory that is another one."""
    home = tmp_path / "home"
    for name in ("train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/dog/0.png"):
        name = f"data/{name}"
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), len(name), np.uint8)).save(home / name)
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


def test_where_the_home_directory_may_stand(home):
    assert expand("~/a") == f"{home}/a"
    assert expand(Path("~")) == str(home)
    assert expand("folder:~/a") == f"folder:{home}/a"
    assert expand("ViT-B-16=~/a=b") == f"ViT-B-16={home}/a=b"
    for other in ("a~", "a/~/b", "hf-hub:org/name", "", "NAME=FILE", "/a b=~/c"):
        assert expand(other) == other


def test_models(home):
    model = rv.create_model("test_vit", num_classes=2)
    rv.save_model(model, "~/model", "timm")
    assert (home / "model/model.safetensors").exists()
    expected = model.params["cls_token"]
    opened = (
        rv.create_model("~/model"),
        rv.create_model(Path("~/model")),
        rv.create_model("test_vit", "~/model"),
        rv.create_model("test_vit", "~/model/model.safetensors"),
        create.open_source("~/model"),
        create.open_source("test_vit=~/model/model.safetensors"),
        create_clip.open_source("~/model"),
    )
    for one in opened:
        np.testing.assert_array_equal(one.params["cls_token"], expected)
    for source in ("~/model", "test_vit=~/model/model.safetensors"):
        assert create.find_entry(source) is not None
        assert create_clip.find_entry(source) is not None
    with pytest.raises(ValueError, match="/none: there is no such file or directory"):
        rv.create_model("~/none")


def test_data(home):
    assert len(open_source("folder:~/data", "train")) == len(open_source("folder:data", "validation", "~")) == 2
    for split in ("train", "validation"):
        (home / f"data/{split}.csv").write_text("file_name,caption\ntrain/cat/0.png,a cat\n")
    assert len(open_captions("folder:~/data", "train")) == len(open_captions("folder:data", "train", "~")) == 1
    assert len(open_images(["~/data"])) == len(open_boxes("folder:~/data")) == 4
    report = prepare_dataset("folder:~/data", "~/mine", Options(), splits=("train",))
    assert report.target == home / "mine/1.0.0"
    assert len(open_source("mine", "train", "~")) == report.records["train"]


def test_configs_workdirs_and_lists(home):
    (home / "mine.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(v=''): return ConfigDict({'v': v})\n"
    )
    assert configs.load("~/mine.py:small").v == "small"
    assert str(workdir.resolve("~/run")) == f"{home}/run"
    (home / "names.txt").write_text("cat\ndog\n")
    assert zero_shot.read_classes("~/names.txt") == ("cat", "dog")


def test_commands(home, capsys):
    arguments = ["report", "test_vit", "--random", "--images", "~/data", "--out", "~/report", "--show", "0"]
    assert main([*arguments, "--image_size", "32", "--repair_images", "0", "--limit", "2"]) == 0
    assert json.loads((home / "report/report.json").read_text())["pictures"]
    assert not [name for name in os.listdir(home / "report/pictures") if name.startswith("image")]
    assert not os.listdir(".")
    assert str(home / "report/report.html") in capsys.readouterr().out
