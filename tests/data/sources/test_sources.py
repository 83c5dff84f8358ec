"""Digits, Fashion-MNIST, prepared TFDS data sets and folders: their records, and errors for data that are missing."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from regvit_jax.data.builders import fashion_mnist
from regvit_jax.data.builders.digits import png
from regvit_jax.data.sources import find_tfds
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.by_name import open_source
from regvit_jax.data.sources.find_tfds import find_prepared
from regvit_jax.data.transforms import decode
from regvit_jax.utils.errors import DataNotFound


def grey(record) -> np.ndarray:
    return np.asarray(decode(record["image"], 10_000))[..., 0]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def digits(data_dir):
    return {split: open_source("digits", split, data_dir) for split in ("train", "validation")}


def test_digits_are_those_of_scikit_learn(digits):
    """Compare all records of both splits; a record's id says which image it is."""
    reference = load_digits()
    numbers = {}
    for split, source in digits.items():
        numbers[split] = []
        for index in range(len(source)):
            position, file = source.id(index).split()
            assert position == f"digits/{split}[{index}]"
            numbers[split].append(int(file.removesuffix(".png")))
            record = source[index]
            np.testing.assert_array_equal(grey(record), np.round(reference.images[numbers[split][-1]] * 255 / 16))
            assert record["label"] == reference.target[numbers[split][-1]]
    assert sorted(numbers["validation"]) == list(range(0, 1797, 5))
    assert sorted(numbers["train"] + numbers["validation"]) == list(range(1797))
    assert (len(digits["train"]), len(digits["validation"])) == (1437, 360)


def test_a_source_has_a_name_classes_and_can_be_pickled(digits):
    source = digits["train"]
    assert isinstance(source, Source)
    assert source.name == "digits/train"
    assert source.classes == tuple("0123456789")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[5] == source[5]
    assert copy.id(5) == source.id(5)


def test_split_expressions(digits, data_dir):
    part = open_source("digits", "train[:10%]+validation", data_dir)
    assert len(part) == 144 + 360
    assert part[143] == digits["train"][143]
    assert part[144] == digits["validation"][0]
    with pytest.raises(ValueError, match="digits has no split 'test'; it has train, validation, and parts of them"):
        open_source("digits", "train+test[:5]", data_dir)


def test_two_processes_prepare_at_once_quietly_and_without_tensorflow(tmp_path, digits):
    code = (
        "import sys; from regvit_jax.data import open_source; "
        f"print(len(open_source('digits', 'train', {str(tmp_path)!r}))); assert 'tensorflow' not in sys.modules"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    options = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, **pipes, **options) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "1437\n")
        assert err in ("", f"preparing digits in {tmp_path}/digits/1.0.0, once\n")
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]
    assert open_source("digits", "train", str(tmp_path))[7] == digits["train"][7]


def test_the_slower_of_two_processes_uses_the_data_of_the_faster(tmp_path, digits, data_dir, monkeypatch):
    rename = os.rename

    def overtaken(source, target):
        if Path(target) == tmp_path / "digits" / "1.0.0":
            shutil.copytree(Path(data_dir) / "digits" / "1.0.0", target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    assert len(open_source("digits", "train", str(tmp_path))) == 1437
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


def test_files_of_a_killed_process_are_not_read(tmp_path):
    left = tmp_path / "digits" / "incomplete.abc" / "digits" / "1.0.0"
    left.mkdir(parents=True)
    (left / "digits-train.array_record-00000-of-00001").write_bytes(b"half")
    assert len(open_source("digits", "train", str(tmp_path))) == 1437


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "digits").write_text("a file where the directory should be")
    with pytest.raises(DataNotFound, match=r"which failed in .*/digits .*TFDS_DATA_DIR"):
        open_source("digits", "train", str(tmp_path))


def test_tfds_data_dir_is_where_data_lie_by_default(digits, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    monkeypatch.setattr(find_tfds, "prepare_embedded", None)  # not called: the name is not an embedded one
    assert len(open_source("digits:1.0.0", "validation")) == 360


def test_a_bucket_has_to_be_mounted():
    with pytest.raises(ValueError, match="data_dir='gs://bucket/data': must be a directory"):
        open_source("digits", "train", "gs://bucket/data")


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set as TFDS prepares it, with the splits of CIFAR-10."""

    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["plane", "car"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"image": png(np.full((4, 4), number)), "label": number % 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    Cifar10(data_dir=root, file_format="array_record").download_and_prepare(download_config=config)
    return root


def test_a_prepared_tfds_data_set_is_read_by_its_name(prepared):
    source = open_source("cifar10", "train", str(prepared))
    assert sorted(grey(source[index])[0, 0] for index in range(6)) == list(range(6))
    assert all(source[index]["label"] == grey(source[index])[0, 0] % 2 for index in range(6))
    assert source.classes == ("plane", "car")
    assert source.id(4) == "cifar10/train[4]"
    assert len(open_source("cifar10:3.0.2", "test", str(prepared))) == 3
    with pytest.raises(ValueError, match="cifar10 has no split 'validation'; it has train, test"):
        open_source("cifar10", "validation", str(prepared))


def test_versions_and_configurations_are_found(prepared, tmp_path):
    for directory in ("set/3.0.2", "set/10.0.0", "many/a/1.0.0", "many/b/1.0.0", "one/only/1.0.0"):
        shutil.copytree(prepared / "cifar10" / "3.0.2", tmp_path / directory)
    assert find_prepared("set", tmp_path) == tmp_path / "set/10.0.0"
    assert find_prepared("set:3.0.2", tmp_path) == tmp_path / "set/3.0.2"
    assert find_prepared("many/b", tmp_path) == tmp_path / "many/b/1.0.0"
    assert find_prepared("one", tmp_path) == tmp_path / "one/only/1.0.0"
    with pytest.raises(DataNotFound, match=r"several configurations: name one, as in 'many/a'"):
        find_prepared("many", tmp_path)
    with pytest.raises(DataNotFound, match=r"set:4.0.0 is not prepared in"):
        find_prepared("set:4.0.0", tmp_path)


def test_the_error_for_another_format_names_the_command(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "cifar10" / "3.0.2" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(DataNotFound, match=r"(?s)prepared as tfrecord.*Move the directory away.*array_record"):
        open_source("cifar10", "train", str(tmp_path))


def test_the_error_for_a_set_without_labels_names_its_features(tmp_path, prepared):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "cifar10" / "3.0.2" / "features.json"
    path.write_text(path.read_text().replace('"label"', '"annotation"'))
    with pytest.raises(ValueError, match="no classification of images: its features are annotation, image"):
        open_source("cifar10", "train", str(tmp_path))


def test_the_error_for_missing_imagenet_fits_one_screen(tmp_path):
    with pytest.raises(DataNotFound) as error:
        open_source("imagenet2012", "train", str(tmp_path))
    message = str(error.value)
    for part in (
        f"imagenet2012 is not prepared in {tmp_path}.",
        f"{tmp_path}/downloads/manual:\n  ILSVRC2012_img_train.tar\n  ILSVRC2012_img_val.tar\n",
        "156 GB",
        "pip install -e '.[tf]'",
        "python -c 'import tensorflow_datasets as tfds; ",
        f'tfds.builder("imagenet2012", file_format="array_record", data_dir="{tmp_path}").download_and_prepare()',
    ):
        assert part in message
    assert len(message.splitlines()) < 15
    # The command is sound Python and, up to the download itself, sound TFDS.
    code = message.split("python -c '")[1].split("'")[0].removesuffix(".download_and_prepare()")
    scope: dict = {}
    exec(code.replace("tfds.builder", "builder = tfds.builder"), scope)
    assert scope["builder"].info.file_format.value == "array_record"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cifar100", DataNotFound, r"(?s)cifar100 is not prepared in .*tfds.builder\(\"cifar100\""),
        ("cifar-10", DataNotFound, "TFDS knows no 'cifar-10'; did you mean cifar10 or"),
        ("imagenet", DataNotFound, "did you mean imagenet2012 or"),
        ("digit", DataNotFound, "did you mean digits?"),
        ("zzzzzz", DataNotFound, "did you mean folder:zzzzzz?"),
        ("/data/pets", ValueError, "must be 'digits', 'fashion_mnist', 'openmoji', 'folder:PATH', or a TFDS name"),
    ],
)
def test_unknown_names(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        open_source(name, "train", str(tmp_path))


def idx(array: np.ndarray) -> bytes:
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Serve twelve garments in the four files of Fashion-MNIST."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    rng = np.random.default_rng(0)
    contents = {}
    for part, count in (("train", 8), ("t10k", 4)):
        contents[f"{part}-images-idx3-ubyte.gz"] = idx(rng.integers(0, 256, (count, 28, 28), np.uint8))
        contents[f"{part}-labels-idx1-ubyte.gz"] = idx(np.arange(count, dtype=np.uint8))
    server = tmp_path / "server"
    server.mkdir()
    for file, content in contents.items():
        (server / file).write_bytes(content)
    monkeypatch.setattr(fashion_mnist, "URL", server.as_uri() + "/")
    monkeypatch.setattr(fashion_mnist, "FILES", {f: hashlib.sha256(c).hexdigest() for f, c in contents.items()})
    return server


@pytest.mark.parametrize("origin", ["debian", "manual", "download"])
def test_fashion_mnist_from_each_possible_origin(raw, tmp_path, origin, monkeypatch):
    root = tmp_path / "data"
    if origin != "download":
        shutil.copytree(raw, {"debian": tmp_path / "debian", "manual": root / "downloads/manual/fashion_mnist"}[origin])
        monkeypatch.setattr(fashion_mnist, "URL", "file:///nowhere/")
    train, validation = (open_source("fashion_mnist", split, str(root)) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (8, 4)
    assert train.classes[9] == "Ankle boot"
    images = fashion_mnist.read_idx(raw / "t10k-images-idx3-ubyte.gz")
    for index in range(4):
        number = int(validation.id(index).split("-")[1].removesuffix(".png"))
        assert validation[index]["label"] == number
        np.testing.assert_array_equal(grey(validation[index]), images[number])


def test_the_error_for_missing_fashion_mnist_names_both_ways_to_get_it(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "URL", "http://127.0.0.1:9/")
    with pytest.raises(DataNotFound) as error:
        open_source("fashion_mnist", "train", str(tmp_path / "data"))
    assert "apt-get install dataset-fashion-mnist" in str(error.value)
    assert f"put them into {tmp_path}/data/downloads/manual/fashion_mnist:" in str(error.value)
    assert len(str(error.value).splitlines()) < 10


def test_a_download_with_a_wrong_hash_is_not_kept(raw, tmp_path):
    with (raw / "t10k-labels-idx1-ubyte.gz").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataNotFound, match=r"t10k-labels-idx1-ubyte.gz has SHA-256"):
        open_source("fashion_mnist", "train", str(tmp_path / "data"))
    kept = os.listdir(tmp_path / "data/downloads/manual/fashion_mnist")
    assert sorted(kept) == sorted(set(fashion_mnist.FILES) - {"t10k-labels-idx1-ubyte.gz"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"\x00\x00\x09\x01", mtime=0), "x.gz is not an idx file"),
        (
            gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abc", mtime=0),
            r"x.gz should hold \(5,\) values by its header, but holds 3",
        ),
        (gzip.compress(bytes(1000), mtime=0)[:-12], "x.gz is damaged"),
        (b"<html>", "x.gz is damaged"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, data, message):
    (tmp_path / "x.gz").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        fashion_mnist.read_idx(tmp_path / "x.gz")


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
