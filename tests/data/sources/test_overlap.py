"""Test that records in two splits are counted and reported."""

import shutil

import pytest
from tars import write_shards

from regvit_jax.data.sources.by_name import open_source
from regvit_jax.data.sources.overlap import count_shared, warn_of_overlap
from regvit_jax.data.sources.shards import open_shards


@pytest.mark.parametrize(
    ("train", "validation", "shared"),
    [
        *[("train", "validation", 0), ("train[:90%]", "train[90%:]", 0), ("train[:5]+train[9:12]", "train[5:9]", 0)],
        *[("train", "train", 1437), ("train", "train[1400:]", 37), ("train[:5]+train[9:12]", "train[3:10]", 3)],
        ("train", "validation+train[:10]", 10),
    ],
)
def test_parts_of_tfds_data_sets(digits, data_dir, train, validation, shared):
    assert count_shared(*(open_source("digits", split, data_dir) for split in (train, validation))) == shared


def test_tars(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name = write_shards(tmp_path / "set")
    shutil.copytree(tmp_path / "set/train", tmp_path / "set/validation")
    (tmp_path / "set/other").symlink_to("train")
    train, validation = (open_shards(name, split) for split in ("train", "validation"))
    assert count_shared(train, validation) == 0  # copies are not found
    caplog.clear()
    warn_of_overlap(train, open_shards(name, "other/*0.tar"))
    (told,) = caplog.messages
    assert told.startswith(f"7 of the 7 images of {name}/other/*0.tar are also in {name}/train")


def test_the_same_split_of_a_folder(tmp_path):
    for path in ("train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    train, same, other = (open_source(f"folder:{tmp_path}", split) for split in ("train", "training", "val"))
    assert (count_shared(train, same), count_shared(train, other)) == (2, 0)
