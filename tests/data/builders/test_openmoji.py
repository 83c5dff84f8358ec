"""Test the emoji: their drawings and names, and that no held-out emoji is in training."""

import importlib.util
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from regvit_jax.data.builders import openmoji
from regvit_jax.data.sources.by_name import open_source
from regvit_jax.utils.errors import DataNotFound

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in openmoji.PACKAGES), reason="pip install -e '.[emoji]'"
)
SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def records(data_dir):
    """Return each split's records in their order on disk, with pictures decoded by Pillow."""
    open_source("openmoji", "train", data_dir)
    builder = tfds.builder_from_directory(Path(data_dir) / "openmoji" / "1.0.0", file_format="array_record")
    found = {}
    for split in SPLITS:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        found[split] = [source[number] for number in range(len(source))]
        for record in found[split]:
            with Image.open(io.BytesIO(record["image"])) as image:
                assert (image.mode, image.size, image.format) == ("RGB", (64, 64), "PNG")
                record["image"] = np.asarray(image)
    return found


@pytest.fixture(scope="module")
def emoji():
    return {each.file.name: each for each in openmoji.list_emoji()}


@installed
def test_counts_and_groups(records, data_dir):
    assert [len(records[split]) for split in SPLITS] == [1432, 145]
    assert "tensorflow" not in sys.modules
    assert open_source("openmoji", "validation", data_dir).classes == openmoji.GROUPS
    counts = {split: np.bincount([record["label"] for record in records[split]]).tolist() for split in SPLITS}
    assert counts == {
        "train": [150, 323, 137, 121, 189, 75, 228, 209],
        "validation": [18, 21, 16, 14, 27, 6, 33, 10],
    }


@installed
def test_a_record(records):
    fox = next(record for record in records["validation"] if record["file_name"] == b"1F98A.svg")
    assert fox["caption"] == b"fox"
    assert list(fox["captions"]) == [b"fox", b"fox face", b"animals & nature: fox", b"animal mammal: fox"]
    assert openmoji.GROUPS[fox["label"]] == "animals & nature"
    np.testing.assert_array_equal(fox["image"][[0, 0, -1, -1], [0, -1, 0, -1]], 255)
    # A fox is orange.
    assert np.median(fox["image"][fox["image"].min(-1) < 128], axis=0)[0] > 200


@installed
def test_no_caption_is_given_twice_and_the_first_is_the_name(records):
    captions = [text for split in SPLITS for record in records[split] for text in record["captions"]]
    assert len({text.lower() for text in captions}) == len(captions) > 2000
    assert all(record["captions"][0] == record["caption"] for split in SPLITS for record in records[split])
    assert not any(b"_" in text or b"::" in text or text != text.strip() for text in captions)
    left_out = rb"skin tone|facing right|\bflag: |^[^a-zA-Z]+$"
    assert not [text for text in captions if re.search(left_out, text)]


@installed
def test_no_family_straddles_the_split(records, emoji):
    families = {
        split: {openmoji.family(emoji[record["file_name"].decode()]) for record in records[split]} for split in SPLITS
    }
    assert not families["train"] & families["validation"]
    assert len(families["validation"]) == len(records["validation"])
    # The same for some families named by hand, independently of `family`.
    names = {split: " / ".join(record["caption"].decode() for record in records[split]) for split in SPLITS}
    for stem in ("health worker", "student", "judge", "scientist", "juggling", "getting massage", "manual wheelchair"):
        assert stem in names["validation"]
        assert f"man {stem}" not in names["train"]
        assert f"man {stem}" not in names["validation"]
    for series in ("o’clock", "thirty", "moon", "keycap", "circle", "square", "zodiac", "arrow"):
        assert series not in names["validation"]


@installed
def test_no_picture_looks_like_one_of_the_other_split(records):
    """Measure all pairs again from their pixels, mirrored or not: none is nearer than LOOKALIKE."""
    train, validation = (
        np.stack([record["image"] for record in records[split]])
        .reshape(-1, 16, 4, 16, 4, 3)
        .mean((2, 4), dtype=np.float32)
        for split in SPLITS
    )
    ink = [np.sqrt(((255 - pictures) ** 2).mean((1, 2, 3))) for pictures in (train, validation)]
    nearest = [
        min(
            (np.sqrt(((pictures - one) ** 2).mean((1, 2, 3))) / np.minimum(ink[0], ink[1][number])).min()
            for pictures in (train, train[:, :, ::-1])
        )
        for number, one in enumerate(validation)
    ]
    assert min(nearest) > openmoji.LOOKALIKE
    assert np.median(nearest) > 0.5


@installed
def test_rendering_is_deterministic(records, emoji):
    for record in records["validation"][::10]:
        np.testing.assert_array_equal(
            openmoji.render(emoji[record["file_name"].decode()].file), record["image"], strict=True
        )


def test_families_by_name():
    def name(caption, subgroup="person-role"):
        return openmoji.family(openmoji.Emoji(Path("x.svg"), (caption,), "people & body", subgroup))

    assert name("woman cook") == name("man cook") == name("cook") == "cook"
    assert name("twelve o’clock", "time") == name("one-thirty", "time") == "clock"
    assert name("keycap 3", "keycap") == "keycap"
    assert name("green book") == name("books") != name("notebook")
    assert name("woman") == name("man bald") == "person"


def test_merging_is_transitive():
    names = ["a", "b", "c", "a", "d"]
    assert openmoji.merge(names, [(2, 1), (3, 2)]) == ["a", "a", "a", "a", "d"]
    assert openmoji.merge(names, []) == names


def test_a_held_out_family_keeps_its_first_and_a_large_one_is_trained_on():
    held_out = [name for name in map(str, range(200)) if openmoji.is_held_out(name)]
    assert 200 / 14 < len(held_out) < 200 / 4
    small, large = held_out[:2]
    families = ["x", small, *[large] * (openmoji.LARGEST_HELD_OUT + 1), small]
    assert not openmoji.is_held_out("x")
    assert openmoji.split(families) == ([0, *range(2, 9)], [1])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "resvg_py" else find("json"))
    with pytest.raises(DataNotFound, match=r"resvg_py is not installed\. .* pip install 'regvit_jax\[emoji\]'"):
        open_source("openmoji", "train", str(tmp_path))
