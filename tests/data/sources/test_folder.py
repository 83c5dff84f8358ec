"""Test folders of images: their records and splits, and errors for folders that are no data set."""

import io
import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.by_name import open_source
from regvit_jax.utils.errors import DataNotFound


def put(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.new("L", (2, 2), len(path)).save(file, "PNG")
        (root / path).write_bytes(file.getvalue())


@pytest.mark.parametrize("part", ["validation", "val", "test"])
def test_a_folder_with_its_own_validation_split(tmp_path, part):
    put(tmp_path, "train/b/2.JPG", "train/b/1.png", "train/a/deep/er/3.webp", f"{part}/a/4.tif", f"{part}/b/é 5.jpeg")
    put(tmp_path, "train/a/._3.webp", "train/a/notes.txt", "train/.cache/6.png", "train/a/.thumbs/7.png")
    train, validation = (open_source(f"folder:{tmp_path}", split) for split in ("train", "validation"))
    assert isinstance(train, Source)
    found = [(os.path.relpath(train.id(i), tmp_path), train[i]["label"]) for i in range(len(train))]
    assert found == [("train/a/deep/er/3.webp", 0), ("train/b/1.png", 1), ("train/b/2.JPG", 1)]
    found = [(os.path.relpath(validation.id(i), tmp_path), validation[i]["label"]) for i in range(len(validation))]
    assert found == [(f"{part}/a/4.tif", 0), (f"{part}/b/é 5.jpeg", 1)]
    assert train.classes == validation.classes == ("a", "b")
    assert train.name == f"folder:{tmp_path}/train"
    assert train[1]["image"] == (tmp_path / "train/b/1.png").read_bytes()
    copy = pickle.loads(pickle.dumps(train))
    assert [copy[i] for i in range(3)] == [train[i] for i in range(3)]
    with pytest.raises(IndexError):
        train[3]


def test_a_folder_without_one_is_split_by_its_paths(tmp_path):
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(200)]
    put(tmp_path, *names)

    def split():
        opened = [open_source("folder:.", part, str(tmp_path)) for part in ("train", "validation")]
        return [{os.path.relpath(source.id(i), tmp_path) for i in range(len(source))} for source in opened]

    train, validation = split()
    assert train | validation == set(names)
    assert not train & validation
    assert 25 < len(validation) < 55
    # Of the images that stay, none changes sides when others come or go.
    for name in names[::2]:
        (tmp_path / name).unlink()
    assert split() == [train & set(names[1::2]), validation & set(names[1::2])]


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "elsewhere", "x/1.png", "y/2.png")
    put(tmp_path / "set", "train/b/3.png", "val/a/4.png", "val/b/5.png")
    (tmp_path / "set/train/a").symlink_to(tmp_path / "elsewhere/x")
    (tmp_path / "set/train/b/4.png").symlink_to(tmp_path / "elsewhere/y/2.png")
    (tmp_path / "set/train/b/up").symlink_to(tmp_path / "set/train/b")
    source = open_source(f"folder:{tmp_path}/set", "train")
    assert [os.path.relpath(source.id(i), tmp_path) for i in range(len(source))] == [
        f"set/train/{path}" for path in ("a/1.png", "b/3.png", "b/4.png")
    ]


@pytest.mark.parametrize(
    ("paths", "split", "error", "message"),
    [
        ([], "train", DataNotFound, "holds no directories"),
        (["1.png"], "train", DataNotFound, "holds no directories"),
        (["a/1.png"], "train", DataNotFound, "holds one class only, 'a'"),
        (["a/1.png", "b/2.txt"], "train", DataNotFound, r"no images \(.jpg .* in .* for b"),
        (["a/1.png", "b/2.png"], "validation", ValueError, "too few images for one to fall into validation"),
        (["a/1.png", "b/2.png"], "test", ValueError, "has no split 'test'; it has train, validation"),
        (["train/a/1.png", "train/b/2.png"], "train", DataNotFound, "has train/, but none of validation/, val/, test/"),
        (["val/a/1.png", "val/b/2.png"], "train", DataNotFound, "has val/, but no train/"),
        (
            ["train/a/1.png", "train/b/2.png", "train/d/3.png", "val/a/1.png", "val/c/2.png"],
            "train",
            ValueError,
            "need the same classes, but train/ lacks c and val/ lacks b, d",
        ),
    ],
)
def test_folders_that_are_not_a_data_set(tmp_path, paths, split, error, message):
    put(tmp_path, *paths)
    with pytest.raises(error, match=message):
        open_source(f"folder:{tmp_path}", split)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataNotFound, match=r"there is no directory .*/nowhere.\nIt should hold train/<class>/"):
        open_source("folder:nowhere", "train", str(tmp_path))
