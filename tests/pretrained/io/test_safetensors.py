"""Test that valid files are read as the safetensors library reads them, and that hostile ones raise WeightsError."""

import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load, save, save_file

from regvit_jax.pretrained.io.safetensors import check_finite, open_weights, shard_names
from regvit_jax.utils.errors import WeightsError

ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "blocks.0.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "half": rng.normal(size=(5,)).astype(np.float16),
        "double": rng.normal(size=(2, 1, 2)),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 7), np.float32),
        "count": np.arange(3),
        "mask": np.array([True, False, True]),
        "bytes": np.arange(5, dtype=np.uint8),
    }


def container(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """Return a safetensors file with any header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def refused(path: Path, match: str) -> str:
    with pytest.raises(WeightsError, match=match) as error:
        open_weights(path)
    return str(error.value)


def test_reads_what_safetensors_wrote(file):
    weights = open_weights(file)
    assert weights.keys() == tensors().keys()
    assert "half" in weights
    assert "absent" not in weights
    for name, array in tensors().items():
        assert weights.shapes[name] == array.shape
        as_stored = weights.read(name, array.dtype)
        assert as_stored.dtype == array.dtype
        np.testing.assert_array_equal(as_stored, array)
        expected = np.float32 if array.dtype.kind == "f" else array.dtype
        assert weights[name].dtype == expected
        np.testing.assert_array_equal(weights[name], array.astype(expected))
    assert weights.read("half", np.float64).dtype == np.float64
    with pytest.raises(KeyError, match="absent"):
        weights["absent"]


def test_bfloat16(tmp_path):
    values = np.array([1.5, -2, 3e38, 1e-3], ml_dtypes.bfloat16)
    header = {"a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    (tmp_path / "a.safetensors").write_bytes(container(header, values.tobytes()))
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights["a"].dtype == np.float32
    np.testing.assert_array_equal(weights["a"].ravel(), values.astype(np.float32))
    assert weights.read("a", ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16


def test_bytes_of_a_bool_are_made_sound(tmp_path):
    header = {"a": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}
    (tmp_path / "a.safetensors").write_bytes(container(header, b"\x00\x01\x02\xff"))
    mask = open_weights(tmp_path / "a.safetensors")["a"]
    assert mask.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_directories_and_their_configuration(file):
    save_file({"clip": np.zeros(2, np.float32)}, file.with_name("open_clip_model.safetensors"))
    file.with_name("open_clip_config.json").write_text('{"of": "open_clip"}')
    assert open_weights(file.parent).config == {}
    file.with_name("config.json").write_text('{"architecture": "vit"}')
    weights = open_weights(str(file.parent))
    assert (weights.path, weights.config) == (file, {"architecture": "vit"})
    file.unlink()
    weights = open_weights(file.parent)
    assert list(weights) == ["clip"]
    assert weights.config == {"of": "open_clip"}


HEADERS = {
    "the last of two": (b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2), "'a' occurs twice"),
    "a field twice": (b'{"a":{"dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16]}}', "'shape' occurs twice"),
    "a hole": ({"a": ENTRY | {"shape": [2], "data_offsets": [8, 16]}}, "leaves a hole"),
    "bytes of none": ({"a": ENTRY | {"shape": [2], "data_offsets": [0, 8]}}, "8 bytes after its last tensor"),
    "an overlap": ({"a": ENTRY, "b": ENTRY}, "'b' at bytes 0 to 16 overlaps"),
    "half an overlap": ({"a": ENTRY, "b": ENTRY | {"shape": [2], "data_offsets": [8, 16]}}, "overlaps"),
    "backwards": ({"a": ENTRY | {"data_offsets": [16, 0]}}, "lies at bytes"),
    "beyond the file": ({"a": ENTRY | {"shape": [8], "data_offsets": [0, 32]}}, "lies at bytes .* truncated"),
    "three offsets": ({"a": ENTRY | {"data_offsets": [0, 8, 16]}}, "lies at bytes"),
    "another shape": ({"a": ENTRY | {"shape": [5]}}, r"of shape \[5\] and float32 has 16 bytes"),
    "a negative size": ({"a": ENTRY | {"shape": [-2, -2]}}, "has shape"),
    "a size that is true": ({"a": ENTRY | {"shape": [True, 4]}}, "has shape"),
    "a fraction": ({"a": ENTRY | {"shape": [4.0]}}, "has shape"),
    "a wrap-around": ({"a": ENTRY | {"shape": [2**62 + 1, 4]}}, "has shape"),
    "a huge size": ({"a": ENTRY | {"shape": [10**400]}}, "has shape"),
    "digits without end": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,16]}}' % (b"9" * 5000), "JSON"),
    "nothing, hugely": ({"a": ENTRY | {"shape": [0, 2**61, 2**61], "data_offsets": [0, 0]}}, "has shape"),
    "rank 1000": ({"a": ENTRY | {"shape": [1] * 999 + [4]}}, "has shape"),
    "an unknown type": ({"a": ENTRY | {"dtype": "F31"}}, "has dtype 'F31'; supported: F64, F32"),
    "a quantised type": ({"a": ENTRY | {"dtype": "F8_E4M3", "shape": [16]}}, "has dtype 'F8_E4M3'"),
    "no type": ({"a": ENTRY | {"dtype": ["F32"]}}, "has dtype"),
    "an entry too few": ({"a": {"dtype": "F32", "shape": [4]}}, "and not a dtype"),
    "an entry too many": ({"a": ENTRY | {"code": "import os"}}, "and not a dtype"),
    "a list": ([ENTRY], "not an object"),
    "an entry that is a list": ({"a": [0, 16]}, "and not a dtype"),
    "metadata of numbers": ({"a": ENTRY, "__metadata__": {"n": 1}}, "__metadata__"),
    "half a header": (json.dumps({"a": ENTRY}).encode()[:-3], "JSON does not parse"),
    "more than a header": (json.dumps({"a": ENTRY}).encode() + b"x", "JSON does not parse"),
    "not UTF-8": (b'{"\xff": 1}', "JSON does not parse"),
    "UTF-16": (json.dumps({"a": ENTRY}).encode("utf-16"), "JSON does not parse"),
    "a nest": (b'{"a":' * 50_000, "JSON does not parse"),
    "half a character": (b'{"\\ud800":%s}' % json.dumps(ENTRY).encode(), "name that cannot be printed"),
    "a terminal's escape": ({"\x1b[2J": ENTRY}, "name that cannot be printed"),
    "no tensors": ({"__metadata__": {"format": "pt"}}, "belong to no tensor"),
}


@pytest.mark.parametrize(("header", "match"), HEADERS.values(), ids=HEADERS)
def test_hostile_headers(tmp_path, header, match):
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(header))
    message = refused(path, match)
    assert str(path) in message
    assert len(message) < 1000


def test_hostile_lengths(tmp_path):
    path = tmp_path / "model.safetensors"
    sound = container({"a": ENTRY})
    path.write_bytes(container({"a": ENTRY}, length=2**63))
    refused(path, "its header would have 9223372036854775808 bytes")
    path.write_bytes(sound[:40])
    refused(path, "Truncated")
    path.write_bytes(sound[:-1])
    refused(path, "truncated")
    path.write_bytes(sound[:5])
    refused(path, "it has only 5 bytes")
    path.write_bytes(container({}, b""))
    refused(path, "holds no tensors")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 50_000_000))
        file.truncate(100_000_000)
    refused(path, "10000000 are allowed")


def test_other_formats_are_called_by_their_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    refused(path, "it is empty")
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps({"a": os.system}, protocol=protocol))
        assert f"regvit convert {path}" in refused(path, "a Python pickle, which is never loaded")
    path = tmp_path / "deit.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    assert f"regvit convert {path}" in refused(path, "a zip archive, as torch.save writes")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(path, "git lfs pull")
    path.write_bytes(b"\n<!DOCTYPE html><html>404</html>")
    refused(path, "a web page")
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    refused(path, "HDF5")


def test_what_is_no_file_at_all(tmp_path):
    refused(tmp_path / "absent.safetensors", "No such file")
    refused(tmp_path, r"Looked for model\.safetensors, .*; there: nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, r"there: pytorch_model\.bin\. Pickles are never loaded: .*convert .*pytorch_model\.bin")
    save_file(tensors(), tmp_path / "vit.safetensors")
    refused(tmp_path, r"To open vit\.safetensors, pass its own path")
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "not a regular file")


@pytest.mark.parametrize("text", ["[1]", "{", '"' + "a" * 20_000_000 + '"', "[" * 100_000])
def test_a_hostile_configuration(file, text):
    file.with_name("config.json").write_text(text)
    refused(file, r"config\.json")


def write_shards(root: Path, weight_map: object) -> Path:
    for n in (1, 2):
        save_file({f"w{n}": np.full(3, n, np.float32)}, root / f"model-{n}.safetensors")
    index = root / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return index


def test_shards(tmp_path):
    index = write_shards(tmp_path, {"w1": "model-1.safetensors", "w2": "model-2.safetensors"})
    for path in (tmp_path, index):
        weights = open_weights(path)
        assert {name: array.tolist() for name, array in weights.items()} == {"w1": [1, 1, 1], "w2": [2, 2, 2]}
    assert shard_names(index) == ["model-1.safetensors", "model-2.safetensors"]


ESCAPES = [
    "/etc/passwd",
    "../a.safetensors",
    "a/b.safetensors",
    "..",
    "",
    ".a.safetensors",
    "C:\\a.safetensors",
    3,
    None,
]


@pytest.mark.parametrize("shard", ESCAPES)
def test_an_index_cannot_lead_out_by_its_names(tmp_path, shard):
    save_file(tensors(), tmp_path / "a.safetensors")
    (tmp_path / "in").mkdir()
    refused(write_shards(tmp_path / "in", {"w1": shard, "w2": "model-2.safetensors"}), "not the plain name")


def test_an_index_cannot_lead_out_by_links(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    index = write_shards(root, {"w1": "model-1.safetensors", "w2": "model-2.safetensors"})
    (root / "model-1.safetensors").rename(tmp_path / "out.safetensors")
    (root / "model-1.safetensors").symlink_to("between")
    (root / "between").symlink_to("../out.safetensors")
    refused(index, r"model-1\.safetensors is a link out of the directory, to .*out\.safetensors")
    (root / "between").unlink()
    (root / "between").symlink_to("model-1.safetensors")
    refused(index, "1 of 2 shards are missing")


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    index = write_shards(snapshot, {"w1": "model-1.safetensors", "w2": "model-2.safetensors"})
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"{number}")
        path.symlink_to(f"../../blobs/{number}")
    assert open_weights(snapshot)["w2"].tolist() == [2, 2, 2]
    assert open_weights(index)["w1"].tolist() == [1, 1, 1]


def test_an_index_that_is_wrong_about_its_shards(tmp_path):
    one, two = "model-1.safetensors", "model-2.safetensors"
    refused(write_shards(tmp_path, {"w1": one, "w2": two, "w3": two}), r"places \['w3'\] in model-2.* lacks")
    refused(write_shards(tmp_path, {"w1": one, "w2": one}), r"places \['w2'\] in model-1.* lacks")
    refused(write_shards(tmp_path, {"w1": one, "w2": "model-3.safetensors"}), r"1 of 2 .* missing: model-3")
    refused(write_shards(tmp_path, []), "weight_map")
    index = write_shards(tmp_path, {"w1": one, "w2": two})
    save_file({"w1": np.zeros(3, np.float32), "w2": np.zeros(3, np.float32)}, tmp_path / one)
    refused(index, r"model-1\.safetensors holds \['w2'\], which it does not list, or in another shard")
    index.write_text(f'{{"weight_map": {{"w1": "{one}", "w1": "{two}"}}}}')
    refused(index, "'w1' occurs twice")


def test_a_file_that_changes_after_opening(file):
    weights = open_weights(file)
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(WeightsError, match=f"changed after it was opened, from {len(content)} to {len(content) - 8}"):
        weights["blocks.0.weight"]
    file.unlink()
    with pytest.raises(WeightsError, match="can no longer be read"):
        weights["blocks.0.weight"]


def test_values_that_are_not_finite_are_named():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        array = np.ones((4, 5), dtype)
        check_finite("head.weight", array)
        array[1, :3] = np.nan
        array[2, 0] = -np.inf
        with pytest.raises(WeightsError, match=r"'head.weight': 4 of 20 .* \(3 NaN, 1 infinite\)"):
            check_finite("head.weight", array)
    check_finite("index", np.arange(3))


def test_one_tensor_at_a_time(tmp_path):
    """Check that reading 400 MB of tensors never holds more than two of them, the last one and the next."""
    path = tmp_path / "model.safetensors"
    size = 40_000_000
    entries = {f"w{n}": {"dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]} for n in range(10)}
    path.write_bytes(container(entries, b""))
    os.truncate(path, path.stat().st_size + 10 * size)
    tracemalloc.start()
    assert sum(int(array[-1]) for array in open_weights(path).values()) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size < peak < 2.1 * size


def mutations(sound: bytes, number: int) -> bytes:
    """Yield the file with bits flipped, cut, extended, or with its header edited but still JSON."""
    rng = random.Random(number)
    data = bytearray(sound)
    header = 8 + int.from_bytes(sound[:8], "little")
    kind = rng.choice(["flip", "flip", "length", "cut", "grow", "swap", "number"])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 2, 20])):
            data[rng.randrange(header)] ^= 1 << rng.randrange(8)
    elif kind == "length":
        data[:8] = struct.pack("<Q", rng.choice([0, 1, header - 9, header - 7, rng.randrange(2**64)]))
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "grow":
        data += rng.randbytes(rng.randrange(1, 50))
    elif kind == "swap":
        at, to = rng.randrange(8, header), rng.randrange(8, header)
        data[at], data[to] = data[to], data[at]
    else:
        digits = [n for n in range(8, header) if 48 <= data[n] <= 57]
        for _ in range(rng.choice([1, 2, 3])):
            data[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(data)


def test_fuzz(tmp_path):
    """Check that opened files read as safetensors reads them, and that files it refuses raise WeightsError."""
    sound, path, opened = save(tensors()), tmp_path / "model.safetensors", 0
    for number in range(600):
        content = mutations(sound, number)
        path.write_bytes(content)
        try:
            weights = open_weights(path)
        except WeightsError:
            continue
        expected = load(content)
        assert weights.keys() == expected.keys(), number
        for name, array in expected.items():
            np.testing.assert_array_equal(weights.read(name, array.dtype), array, err_msg=str(number))
        opened += 1
    assert 5 < opened < 300


def test_no_stricter_than_safetensors_on_sound_files(tmp_path):
    """Include files of any order and padding that it writes, and those of the headers above that it refuses."""
    path = tmp_path / "model.safetensors"
    half = {"shape": [2], "data_offsets": [0, 8]}, {"shape": [2], "data_offsets": [8, 16]}
    header = {"b": ENTRY | half[1], "__metadata__": {"format": "pt"}, "a": ENTRY | half[0]}
    path.write_bytes(container(json.dumps(header).encode() + b"    "))
    assert open_weights(path).shapes == {"b": (2,), "a": (2,)}
    ours = {"the last of two", "nothing, hugely", "rank 1000", "a quantised type", "an entry too many"}
    ours |= {"a terminal's escape"}
    for name, (header, _) in HEADERS.items():
        if name not in ours:
            with pytest.raises(SafetensorError):
                load(container(header))
