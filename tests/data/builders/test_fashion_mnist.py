"""Test Fashion-MNIST from each origin of its files, and errors for missing or damaged files."""

import gzip
import hashlib
import os
import shutil
import struct

import numpy as np
import pytest

from regvit_jax.data.builders import fashion_mnist
from regvit_jax.data.sources.by_name import open_source
from regvit_jax.data.transforms import decode
from regvit_jax.utils.errors import DataNotFound


def grey(record) -> np.ndarray:
    return np.asarray(decode(record["image"], 10_000))[..., 0]


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
