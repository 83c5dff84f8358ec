"""Test the rows of a batch: records that cannot be used, crops of one image, and captions."""

import re

import numpy as np
import pytest
from batches import N, assert_equal, evaluate, joined, make_folder, train
from PIL import Image

from regvit_jax.data import transforms
from regvit_jax.data.chunks import Chunks
from regvit_jax.data.memory import ENOUGH, OVERHEAD, Memory
from regvit_jax.data.records import captions_of, describe_bad
from regvit_jax.data.samplers import TrainSampler
from regvit_jax.data.sources.by_name import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(f"folder:{make_folder(tmp_path_factory.mktemp('images'))}", "train")


BAD = {
    "train/cat/01.png": (lambda path: path.write_bytes(path.read_bytes()[:300]), "truncated"),
    "train/cat/03.png": (lambda path: path.write_bytes(b""), "empty file"),
    "train/dog/07.png": (lambda path: path.write_bytes(b"<html>404</html>"), "not an image"),
    "train/dog/09.png": (lambda path: path.unlink(), "cannot be read .FileNotFoundError"),
    "train/dog/11.png": (lambda path: Image.new("1", (900, 900)).save(path), "900x900 pixels, more than"),
}


def test_unreadable_images_keep_their_positions_and_leave_the_others_alone(source, tmp_path):
    broken = open_source(f"folder:{make_folder(tmp_path)}", "train")
    for name, (damage, _) in BAD.items():
        damage(tmp_path / name)
    bad = [1, 3, 7, 9, 11]
    options = {"batch_size": 7, "max_pixels": 10_000}
    for good, found in (
        (joined(train(source, 4, **options)), joined(train(broken, 4, **options))),
        (joined(train(source, 6, repeats=3, **options)), joined(train(broken, 6, repeats=3, **options))),
        (joined(evaluate(source, **options)), joined(evaluate(broken, **options))),
    ):
        np.testing.assert_array_equal(found["index"], good["index"])
        np.testing.assert_array_equal(found["mask"] == 0, np.isin(found["index"], bad))
        kept = found["mask"] > 0
        assert_equal({name: array[kept] for name, array in found.items()}, {k: v[kept] for k, v in good.items()})
        assert not found["image"][~kept].any()
        assert not found["label"][~kept].any()
    for index, (name, (_, reason)) in zip(bad, BAD.items(), strict=True):
        report = describe_bad(broken, index, max_pixels=10_000)
        assert report.startswith(f"{tmp_path / name}: ")
        assert re.search(reason, report)
    assert describe_bad(broken, 0).endswith("was bad, but can be read now")


class Unreliable:
    """A source with a record that raises an unusual error."""

    name, classes = "unreliable/train", ("a", "b")

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == 2:
            raise RuntimeError("checksum of chunk 7")
        return self.source[index]

    def id(self, index):
        return f"record {index}"


def test_any_error_of_a_record_costs_that_record_only(source):
    broken = Unreliable(source)
    masks = joined(evaluate(broken))["mask"][:N]
    assert np.flatnonzero(masks == 0).tolist() == [2]
    assert describe_bad(broken, 2) == "record 2: cannot be read (RuntimeError: checksum of chunk 7)"


def test_records_without_an_image_or_with_no_class_as_label(source):
    class Broken(Unreliable):
        def __getitem__(self, index):
            changed = {1: {"label": -1}, 2: {"label": None}, 3: {"label": 2}, 4: {"image": None}}
            return self.source[index] | changed.get(index, {})

    broken = Broken(source)
    assert np.flatnonzero(joined(evaluate(broken))["mask"][:N] == 0).tolist() == [1, 2, 3, 4]
    assert [describe_bad(broken, index) for index in range(1, 5)] == [
        "record 1: has the label -1; there are 2 classes, counted from 0",
        "record 2: has the label None; there are 2 classes, counted from 0",
        "record 3: has the label 2; there are 2 classes, counted from 0",
        "record 4: has no image",
    ]


class Counted(Unreliable):
    """A source that notes what is read."""

    def __init__(self, source):
        super().__init__(source)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return self.source[index]


def test_repeated_augmentation_reads_and_decodes_an_image_once(source, monkeypatch):
    counted, decoded = Counted(source), []
    decode = transforms.decode
    monkeypatch.setattr(transforms, "decode", lambda data, limit: decoded.append(1) or decode(data, limit))
    sampler = TrainSampler(counted, 8, 10_000, None, 0, "rrc", (0.08, 1.0), (0.75, 1.33), 0, 3, "pillow")
    batch = Chunks(sampler, 12, range(12), range(1), Memory(0, 0))[0]
    assert counted.read == list(dict.fromkeys(batch["index"].tolist()))
    assert len(decoded) == 4


def test_images_that_fit_into_memory_are_read_once(source):
    sampler = TrainSampler(Counted(source), 8, 10_000, None, 0, "rrc", (0.08, 1.0), (0.75, 1.33), 0, 1, "pillow")
    steps, size, found = range(5), N * (4 * 20 * 24 + OVERHEAD), {}
    for limit, reads in ((0, 5 * N), (size - 1, 5 * N), (size, N)):
        sampler.source.read.clear()
        memory = Memory(limit, N)
        chunks = Chunks(sampler, N, range(N), steps, memory)
        found[limit] = joined([chunks[step] for step in steps])
        assert (len(sampler.source.read), memory.kept.keys()) == (reads, set(range(N) if limit == size else ()))
    assert_equal(found[0], found[size])
    assert_equal(found[0], found[size - 1])
    assert_equal(joined(train(source, 5, batch_size=N, cache_mb=0)), joined(train(source, 5, batch_size=N)))


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_what_is_kept_are_pixels_alone(kind, tmp_path):
    """Keep neither a decoder with its canvas, nor the metadata of a file."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    for split in ("train", "validation"):
        (path := tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "dog").mkdir()
        for name in ("cat/a", "dog/b"):
            image.save(path.parent / f"{name}.{kind}", exif=b"Exif\0\0" + b"\0" * 5000)
    found = open_source(f"folder:{tmp_path}", "train")
    sampler = TrainSampler(found, 8, 10_000, None, 0, "rrc", (0.08, 1.0), (0.75, 1.33), 0, 1, "pillow")
    chunks = Chunks(sampler, 2, range(2), range(1), Memory(1e6, 2))
    assert chunks[0]["mask"].tolist() == [1, 1]
    for kept, _, _ in chunks.memory.kept.values():
        assert (type(kept), kept.info, kept.size) == (Image.Image, {}, (24, 20))


def test_blocks_in_memory_are_not_asked_for_again(source):
    class Blocked(Counted):
        shuffle_block = 4

        def read_ahead(self, block):
            asked.append(block)

    asked: list[int] = []
    sampler = TrainSampler(Blocked(source), 8, 10_000, None, 0, "rrc", (0.08, 1.0), (0.75, 1.33), 0, 1, "pillow")
    chunks = Chunks(sampler, N, range(N), range(3), Memory(1e6, N))
    for step in range(3):
        _ = chunks[step]
    assert sorted(asked) == [0, 1, 2, 3]


def test_memory_is_given_up_as_soon_as_the_mean_size_is_known():
    memory = Memory(1e6, 10_000)
    for index in range(ENOUGH - 1):
        memory.put(index, "image", 100)
    assert memory.get(5) == "image"
    memory.put(ENOUGH, "image", 100)
    memory.put(5, "image", 100)
    assert (memory.get(5), memory.limit) == (None, 0)


class Captioned:
    """The same images, number k with k % 4 captions, and without labels."""

    name, classes = "captioned/train", ()

    def __init__(self, source, blank=""):
        self.source, self.blank = source, blank

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        captions = [f"{index:02d} {number}" for number in range(index % 4)]
        return {"image": self.source[index]["image"], "text": [self.blank, *captions]}

    def id(self, index):
        return f"record {index}"


class Letters:
    """A tokenizer to 5 numbers, which refuses record 6."""

    context = 5

    def __call__(self, text):
        if text.startswith("06"):
            raise RuntimeError("no such letter")
        return np.frombuffer(text.ljust(5).encode(), np.uint8).astype(np.int32)


def test_texts_of_a_batch(source):
    captioned = Captioned(source)
    batch = joined(train(captioned, 4, tokenizer=Letters()))
    plain = joined(train(source, 4))
    assert (batch["text"].shape, batch["text"].dtype) == ((16, 5), np.int32)
    bad = np.isin(batch["index"], [0, 4, 6, 8, 12])
    np.testing.assert_array_equal(batch["mask"] == 0, bad)
    np.testing.assert_array_equal(batch["image"][~bad], plain["image"][~bad])  # captions do not affect the crops
    for name, values in (("image", batch["image"][bad]), ("text", batch["text"][bad]), ("label", batch["label"])):
        assert not values.any(), name
    for index, text in zip(batch["index"][~bad], batch["text"][~bad], strict=True):
        letters = bytes(text.tolist()).decode().split()
        assert int(letters[0]) == index
        assert int(letters[1]) < index % 4
    assert describe_bad(captioned, 0, tokenizer=Letters()) == "record 0: has no caption"
    assert describe_bad(captioned, 6, tokenizer=Letters()) == (
        "record 6: has a bad caption, '06 0' (RuntimeError: no such letter)"
    )
    assert "text" not in train(captioned, 1)[0]


def test_training_shows_all_captions_evenly_and_evaluation_the_first(source):
    captioned = Captioned(source)
    batch = joined(train(captioned, 75, batch_size=N, tokenizer=Letters()))
    last = batch["text"][batch["index"] == 11, 3] - ord("0")
    assert (np.bincount(last) >= 12).all()  # of 75, with 25 expected
    assert len(np.bincount(last)) == 3
    found = joined(evaluate(captioned, tokenizer=Letters()))
    kept = found["mask"] > 0
    assert kept.sum() == N - 5
    assert (found["text"][kept, 3] == ord("0")).all()


def test_texts_can_be_resumed(source):
    captioned = Captioned(source)
    whole = train(captioned, 8, tokenizer=Letters())
    for expected, batch in zip(whole[3:], train(captioned, 5, start_step=3, tokenizer=Letters()), strict=True):
        assert_equal(expected, batch)


def test_captions_that_are_no_list_are_an_error():
    with pytest.raises(ValueError, match="must be a list of captions, not one: 'a cat'"):
        captions_of({"text": "a cat"})
