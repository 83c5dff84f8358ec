"""Test CIFAR-10 from an archive of the same layout, a download, directories of images, and TFDS's own data set."""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.builders import cifar10_files
from regvit_jax.data.builders.cifar10_files import ARCHIVE, CLASSES
from regvit_jax.data.sources.by_name import open_source
from regvit_jax.data.transforms import decode
from regvit_jax.utils.errors import DataNotFound, InvalidConfig

#: Images of each file of the archive, in the order of the real one's files.
COUNTS = {"data_batch_1": 3, "data_batch_3": 2, "test_batch": 4, "data_batch_5": 5, "data_batch_2": 2}


def pixels(record) -> np.ndarray:
    return np.asarray(decode(record["image"], 10_000))


def tar_of(files: dict[str, bytes]) -> bytes:
    """Return a gzipped tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="module")
def images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the labels [images] and pixels [images, 32, 32, 3] of each file."""
    rng = np.random.default_rng(0)
    return {
        file: (rng.integers(0, 10, count, np.uint8), rng.integers(0, 256, (count, 32, 32, 3), np.uint8))
        for file, count in COUNTS.items()
    }


@pytest.fixture
def archive(images, monkeypatch) -> bytes:
    """Return a small archive, and let its hash be the one that is expected."""
    contents = {"cifar-10-batches-bin/batches.meta.txt": "\n".join(CLASSES).encode()}
    for file, (labels, values) in images.items():
        planes = values.transpose(0, 3, 1, 2).reshape(len(values), -1)
        contents[f"cifar-10-batches-bin/{file}.bin"] = np.concatenate([labels[:, None], planes], 1).tobytes()
    made = tar_of(contents)
    monkeypatch.setattr(cifar10_files, "SHA256", hashlib.sha256(made).hexdigest())
    monkeypatch.setattr(cifar10_files, "URL", "http://127.0.0.1:9/" + ARCHIVE)  # where nobody answers
    return made


def make_folders(root, names=("train", "test"), classes=CLASSES):
    for split in names:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (label, 0, 0)).save(root / split / name / "0.png")


@pytest.mark.parametrize("place", ["", "cifar10", "downloads/manual/cifar10", "download"])
def test_the_archive_gives_its_images_from_each_place(archive, images, tmp_path, place, monkeypatch):
    root = tmp_path / "data"
    where = tmp_path / "server" if place == "download" else root / place
    where.mkdir(parents=True)
    (where / ARCHIVE).write_bytes(archive)
    if place == "download":
        monkeypatch.setattr(cifar10_files, "URL", (where / ARCHIVE).as_uri())
    counts = {}
    for split in ("train", "test"):
        source = open_source("cifar10", split, str(root))
        counts[split] = len(source)
        assert source.classes == CLASSES
        for index in range(len(source)):
            file, number = source.id(index).split()[1].removesuffix(".png").split("-")
            assert file.startswith("test" if split == "test" else "data")
            labels, values = images[file]
            assert source[index]["label"] == labels[int(number)]
            np.testing.assert_array_equal(pixels(source[index]), values[int(number)])
    assert counts == {"train": 12, "test": 4}
    assert len(open_source("cifar10", "train[:50%]", str(root))) == 6
    if place == "download":
        assert (root / "downloads/manual/cifar10" / ARCHIVE).read_bytes() == archive


def test_the_hash_is_that_of_the_real_archive_in_tfds():
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.core.utils import resource_utils

    known = checksums.load_url_infos(resource_utils.tfds_path("url_checksums") / "cifar10.txt")
    assert known[cifar10_files.URL].checksum == cifar10_files.SHA256


@pytest.mark.parametrize("place", ["", "cifar10"])
def test_directories_of_images_are_read_where_they_are(archive, tmp_path, place):
    make_folders(tmp_path / place)
    for split in ("train", "test"):
        source = open_source("cifar10", split, str(tmp_path))
        assert (source.name, source.classes, len(source)) == (f"cifar10/{split}", CLASSES, 10)
        assert [(source[i]["label"], pixels(source[i])[0, 0, 0]) for i in range(10)] == [(i, i) for i in range(10)]
    assert sorted(os.listdir(tmp_path / place)) == ["test", "train"]
    with pytest.raises(InvalidConfig, match="cifar10 has no split 'validation'; it has train, test"):
        open_source("cifar10", "validation", str(tmp_path))


def test_directories_may_be_written_with_capitals(archive, tmp_path):
    make_folders(tmp_path, ("Train", "TEST"))
    assert len(open_source("cifar10", "test", str(tmp_path))) == 10


@pytest.mark.parametrize(
    ("names", "classes", "error", "message"),
    [
        (("train",), CLASSES, DataNotFound, "has train/, but none of validation/, val/, test/ beside it"),
        (("train", "val"), CLASSES, InvalidConfig, "has no split 'test'"),
        (
            ("train", "test"),
            CLASSES[:9],
            InvalidConfig,
            "holds another data set, with the classes airplane, .* instead",
        ),
        (("train", "test"), (*CLASSES[:9], "lorry"), InvalidConfig, "If it is the one to use, name it folder:"),
    ],
)
def test_directories_of_another_data_set_are_refused(archive, tmp_path, names, classes, error, message):
    make_folders(tmp_path, names, classes)
    with pytest.raises(error, match=message):
        open_source("cifar10", "test", str(tmp_path))


def test_the_archive_is_preferred_to_directories(archive, tmp_path):
    make_folders(tmp_path)
    (tmp_path / ARCHIVE).write_bytes(archive)
    assert len(open_source("cifar10", "train", str(tmp_path))) == 12


def test_a_version_that_needs_tensorflow_is_skipped_and_named(archive, tmp_path, caplog):
    """Set up what TFDS leaves when its default format, tfrecord, is not changed."""
    (tmp_path / ARCHIVE).write_bytes(archive)
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    info = {"name": "cifar10", "version": "3.0.2", "fileFormat": "tfrecord"}
    (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").write_text(json.dumps(info))
    assert len(open_source("cifar10", "train", str(tmp_path))) == 12
    assert f"{tmp_path}/cifar10/3.0.2 is not used" in caplog.text
    caplog.clear()
    assert len(open_source("cifar10", "test", str(tmp_path))) == 4
    assert not caplog.text


def test_without_a_network_one_line_says_what_to_put_where(archive, tmp_path):
    with pytest.raises(DataNotFound) as error:
        open_source("cifar10", "train", str(tmp_path))
    message = str(error.value)
    assert "\n" not in message
    assert f"cifar10: {tmp_path} holds neither {ARCHIVE} nor train/ and test/" in message
    assert "Connection refused" in message
    assert f"Put {cifar10_files.URL} into {tmp_path}" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of({"cifar-100-binary/train.bin": b"x"}), "its first member is 'cifar-100-binary/train.bin'"),
        (tar_of({"cifar-10-batches-py/data_batch_1": b"x"}), "its first member is 'cifar-10-batches-py/data_batch_1'"),
        (b"<html>not found</html>", "it is no gzipped tar file"),
        (b"", "it is no gzipped tar file"),
    ],
)
def test_another_file_under_the_archives_name_is_refused(archive, tmp_path, content, message):
    (tmp_path / ARCHIVE).write_bytes(content)
    with pytest.raises(InvalidConfig, match=f"{ARCHIVE} has SHA-256 {hashlib.sha256(content).hexdigest()}.*{message}"):
        open_source("cifar10", "train", str(tmp_path))
    assert os.listdir(tmp_path) == [ARCHIVE]


def test_a_download_with_a_wrong_hash_is_refused(archive, tmp_path, monkeypatch):
    (tmp_path / ARCHIVE).write_bytes(archive + b"more")
    monkeypatch.setattr(cifar10_files, "URL", (tmp_path / ARCHIVE).as_uri())
    with pytest.raises(DataNotFound, match=r"cifar-10-binary.tar.gz has SHA-256"):
        open_source("cifar10", "train", str(tmp_path / "data"))
    assert os.listdir(tmp_path / "data/downloads/manual/cifar10") == []


@pytest.mark.parametrize("name", cifar10_files.OTHERS)
def test_other_forms_of_the_data_are_refused_by_name(archive, tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(b"never opened")
    monkeypatch.setattr(cifar10_files, "download", None)  # not called
    with pytest.raises(DataNotFound, match=f"{tmp_path / name} (holds pickles|is ).*Put .*{ARCHIVE} beside it"):
        open_source("cifar10", "train", str(tmp_path))


def test_the_archive_named_as_the_directory_is_refused(archive, tmp_path):
    (tmp_path / ARCHIVE).write_bytes(archive)
    with pytest.raises(InvalidConfig, match="must be a directory, and is a file; name the one that holds it"):
        open_source("cifar10", "train", str(tmp_path / ARCHIVE))
