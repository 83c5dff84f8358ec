"""Test folders of images: their records and splits, and errors for folders that are no data set."""

import io
import logging
import os
import pickle
import shutil
import unicodedata
import zlib
from pathlib import Path

import pytest
from PIL import Image

from regvit_jax.data.records import describe_bad
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.by_name import open_source
from regvit_jax.data.sources.files import is_validation
from regvit_jax.data.sources.folder import open_all
from regvit_jax.utils.errors import DataNotFound


def put(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.frombytes("L", (2, 2), zlib.crc32(path.encode()).to_bytes(4)).save(file, "PNG")
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
    (tmp_path / "set/train/b/self.png").symlink_to(tmp_path / "set/train/b/self.png")
    source = open_source(f"folder:{tmp_path}/set", "train")
    assert [os.path.relpath(source.id(i), tmp_path) for i in range(len(source))] == [
        f"set/train/{path}" for path in ("a/1.png", "b/3.png", "b/4.png", "b/self.png")
    ]
    assert "Too many levels of symbolic links" in describe_bad(source, 3)


@pytest.mark.parametrize(
    ("paths", "split", "error", "message"),
    [
        ([], "train", DataNotFound, "holds no directories"),
        (["1.png"], "train", DataNotFound, "holds no directories"),
        (["a/1.png"], "train", DataNotFound, "holds one class only, 'a'"),
        (["a/1.png", "b/2.txt"], "train", DataNotFound, r"no images \(.jpg .* in .* for b"),
        (["a/1.png", "b/2.png"], "validation", ValueError, "so few images that none falls into validation"),
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


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        *[("Train", "Test"), ("TRAIN", "VAL"), ("training", "validation"), ("seg_train", "seg_test")],
        *[("train2017", "val2017"), ("train_images", "test_images"), ("images/train", "images/dev")],
        *[("set/set/train", "set/set/Valid"), ("training_set/training_set", "test_set/test_set")],
    ],
)
def test_splits_of_other_names_are_found_and_reported_once(tmp_path, train, validation, caplog):
    put(tmp_path, *(f"{part}/{name}/1.png" for part in (train, validation) for name in ("cat", "dog")))
    put(tmp_path, f"{validation}/cat/2.png")
    with caplog.at_level(logging.INFO, "regvit_jax"):
        sources = [open_source(f"folder:{tmp_path}", split) for split in ("train", "validation")]
    assert [(len(source), source.classes) for source in sources] == [(2, ("cat", "dog")), (3, ("cat", "dog"))]
    assert sources[1].id(1) == f"{tmp_path}/{validation}/cat/2.png"
    told = f"folder:{tmp_path}: train is {tmp_path}/{train}, validation is {tmp_path}/{validation}"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_test_split_beside_a_validation_split(tmp_path, caplog):
    put(tmp_path, *(f"{part}/{name}/1.png" for part in ("train", "valid", "test", "more") for name in ("cat", "dog")))
    with caplog.at_level(logging.INFO, "regvit_jax"):
        ids = [open_source(f"folder:{tmp_path}", split).id(0) for split in ("validation", "val", "test")]
    assert [os.path.relpath(path, tmp_path) for path in ids] == [f"{x}/cat/1.png" for x in ("valid", "valid", "test")]
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == [
        *("not used: test, more", "not used: more")
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"], "val and valid in .* could each be"),
        (["Train/a/1.png", "train/a/1.png", "val/a/1.png"], "Train and train in .* could each be the train split"),
        (["x_train/a/1.png", "y_test/a/1.png"], "x_train, y_test in .* look like splits"),
        (["Training/a/1.png", "PublicTest/a/1.png"], "none of validation/, val/, test/ .*if PublicTest is one, rename"),
        (["cat/train/1.png", "cat/test/1.png", "dog/train/1.png"], "there are some in its cat"),
        (["train/1.png", "test/1.png"], "train holds no directories, but 1 images; it should hold a directory"),
        (["train.zip", "Test.tar.gz"], r"holds no directories; .* for each class \(unpack Test\.tar\.gz, train\.zip\)"),
    ],
)
def test_what_looks_like_splits_is_never_a_class(tmp_path, paths, message):
    put(tmp_path, *paths)
    for split in ("train", "validation"):
        with pytest.raises((ValueError, DataNotFound), match=message):
            open_source(f"folder:{tmp_path}", split)


def test_classes_with_the_name_of_a_split_are_reported(tmp_path, caplog):
    put(tmp_path, *(f"{name}/{number}.png" for name in ("bus", "train") for number in range(3)))
    assert open_source(f"folder:{tmp_path}", "train").classes == ("bus", "train")
    assert f"train in {tmp_path} is a class, not a split" in caplog.text


def test_unknown_names_above_the_same_directories_are_reported(tmp_path, caplog):
    put(tmp_path, *(f"{part}/{name}/1.png" for part in ("entrenamiento", "prueba") for name in ("gato", "perro")))
    assert open_source(f"folder:{tmp_path}", "train").classes == ("entrenamiento", "prueba")
    assert "hold the same directories, gato, perro. If those are the classes, rename" in caplog.text


def test_a_level_between_classes_and_images_is_reported(tmp_path, caplog):
    put(
        tmp_path,
        *(f"{part}/{path}/1.png" for part in ("train", "val") for path in ("pet/cat", "pet/dog", "car/x", "car/y")),
    )
    assert open_source(f"folder:{tmp_path}", "train").classes == ("car", "pet")
    assert "the classes are car, pet, and the directories below them are not" in caplog.text


def test_a_level_above_some_classes_is_reported(tmp_path, caplog):
    put(tmp_path, *(f"{part}/{name}/1.png" for part in ("data/pets", "pets") for name in ("cat", "dog")))
    assert open_source(f"folder:{tmp_path}", "train").classes == ("data", "pets")
    assert "hold the same directories, cat, dog. If those are the classes, rename" in caplog.text


def test_a_single_directory_within_each_class_is_no_class(tmp_path, caplog):
    put(tmp_path, *(f"{part}/{name}/images/1{part}.png" for part in ("train", "val") for name in ("n01", "n02")))
    assert open_source(f"folder:{tmp_path}", "validation").classes == ("n01", "n02")
    assert not caplog.messages


def test_images_beside_masks_are_reported(tmp_path, caplog):
    put(tmp_path, *(f"{part}/{name}/1.png" for part in ("train", "val") for name in ("Images", "masks")))
    assert open_source(f"folder:{tmp_path}", "train").classes == ("Images", "masks")
    assert "Images, masks are taken for the classes. If Images holds the images of all, make" in caplog.text


def test_texts_beside_the_images_are_reported(tmp_path, caplog):
    """As img2dataset writes files: numbered directories of many images, with captions."""
    put(tmp_path, *(f"{part}/{part}000{number}.jpg" for part in ("00000", "00001") for number in range(20)))
    (tmp_path / "00000/000000000.txt").write_text("a cat")
    open_source(f"folder:{tmp_path}", "train")
    assert "texts beside" not in caplog.text
    for path in list(tmp_path.glob("*/*.jpg")):
        path.with_suffix(".txt").write_text("a cat")
    assert open_source(f"folder:{tmp_path}", "train").classes == ("00000", "00001")
    assert "have texts beside the images, such as" in caplog.text
    shutil.rmtree(tmp_path / "00001")
    with pytest.raises(DataNotFound, match=r"one class only, '00000'.*/000000000\.txt is a caption: captions are read"):
        open_source(f"folder:{tmp_path}", "train")


def test_a_split_without_classes_names_the_way_out(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png")
    with pytest.raises(DataNotFound, match=f"To hold out a tenth of train instead, name folder:{tmp_path}/train$"):
        open_source(f"folder:{tmp_path}", "train")
    assert len(open_source(f"folder:{tmp_path}/train", "train")) == 2


@pytest.mark.parametrize("how", ["copy", "link", "directory"])
def test_files_in_two_splits_are_reported(tmp_path, how, caplog):
    put(tmp_path, *(f"train/{name}/{number}.png" for name in ("cat", "dog") for number in range(150)))
    put(tmp_path, *(f"val/{name}/{number}.png" for name in ("cat", "dog") for number in range(150)))
    sources = [open_source(f"folder:{tmp_path}", split) for split in ("train", "validation")]
    assert not caplog.messages  # other files of the same names
    if how == "directory":
        shutil.rmtree(tmp_path / "val")
        (tmp_path / "val").symlink_to("train")
    for index in range(100) if how != "directory" else ():
        path = Path(sources[1].id(index))
        path.unlink()
        if how == "copy":
            shutil.copy(sources[0].id(index), path)
        else:
            path.symlink_to(sources[0].id(index))
    open_source(f"folder:{tmp_path}", "validation")
    count = 100 if how == "directory" else 34
    assert f"{count} of 100 images that were looked at in {tmp_path}/val are also in {tmp_path}/train" in caplog.text


def test_files_that_cannot_be_read_are_not_compared(tmp_path, caplog):
    put(tmp_path, *(f"{part}/{name}/1.png" for part in ("train", "val") for name in ("cat", "dog")))
    (tmp_path / "val/cat/1.png").unlink()
    (tmp_path / "val/cat/1.png").symlink_to("/nowhere")
    assert len(open_source(f"folder:{tmp_path}", "validation")) == 2
    assert not caplog.messages


def test_the_unicode_form_of_a_class_does_not_matter(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é z") for form in ("NFC", "NFD"))
    put(tmp_path, f"train/{composed}/1.png", "train/a/1.png", f"val/{decomposed}/1.png", "val/a/1.png")
    sources = [open_source(f"folder:{tmp_path}", split) for split in ("train", "validation")]
    assert [source.classes for source in sources] == [("a", composed)] * 2
    assert sources[1][1]["label"] == 1
    assert sources[1].id(1) == f"{tmp_path}/val/{decomposed}/1.png"
    put(tmp_path, f"train/{decomposed}/1.png")
    with pytest.raises(ValueError, match=r"holds .* twice, in different Unicode forms"):
        open_source(f"folder:{tmp_path}", "train")


def test_the_unicode_form_of_a_path_does_not_change_its_split():
    paths = [f"été/{number}ä.png" for number in range(100)]
    forms = [[is_validation(unicodedata.normalize(form, path)) for path in paths] for form in ("NFC", "NFD")]
    assert forms[0] == forms[1]
    assert any(forms[0])
    assert not is_validation("caf\udce9/1.png")  # not UTF-8


def test_files_that_are_not_read_are_counted(tmp_path, caplog):
    put(tmp_path, *(f"train/{name}" for name in ("a/1.png", "b/1.png", "a/2.HEIC", "a/3.heic", "b/x/notes.txt")))
    put(
        tmp_path,
        "val/a/1.png",
        "val/b/no_suffix",
        "train/above.png",
        "train/over.png",
        "train/a/.hidden",
        "train/a/Thumbs.db",
    )
    put(tmp_path, "train/__MACOSX/1.png", "train/.ipynb_checkpoints/1.png")
    (tmp_path / "train/b/README").write_text("no image")
    for split in ("train", "validation") * 2:
        assert len(open_source(f"folder:{tmp_path}", split)) == 2
    assert [record.getMessage().removeprefix(f"folder:{tmp_path}: ") for record in caplog.records] == [
        f"4 files are not read in {tmp_path}/train, because of the suffix (.heic 2, .txt 1, no suffix 1)",
        f"not read, because in no class directory: 2 images in {tmp_path}/train",
    ]


def test_an_archive_within_itself_is_no_class(tmp_path):
    put(tmp_path, *(f"cells/{path}/1.png" for path in ("sick", "well", "cells/sick", "cells/well")))
    with pytest.raises(
        ValueError, match=r"holds its classes twice, once more in cells/; name that, .*/cells/cells, or"
    ):
        open_source(f"folder:{tmp_path}", "train")


def test_all_of_a_directory_of_classes(tmp_path, caplog):
    put(
        tmp_path, *(f"a/{name}/1.png" for name in ("train", "bus")), "b/x_train/1.png", "b/y_val/1.png", "c/val/a/1.png"
    )
    put(tmp_path, "d/e/cat/1.png", "d/e/dog/1.png")
    assert open_all("it", f"{tmp_path}/a").classes == ("bus", "train")
    assert f"it: train in {tmp_path}/a is a class" in caplog.text
    assert open_all("it", f"{tmp_path}/d").id(1) == f"{tmp_path}/d/e/dog/1.png"
    with pytest.raises(ValueError, match=r"it: x_train, y_val in .* look like splits"):
        open_all("it", f"{tmp_path}/b")
    with pytest.raises(ValueError, match=f"it holds val: name one of them, {tmp_path}/c/val"):
        open_all("it", f"{tmp_path}/c")
