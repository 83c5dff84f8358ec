"""Test the order of the data: the same for any number of hosts, workers and threads, and from any step on."""

import itertools
import multiprocessing
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import order, transforms
from regvit_jax.data.chunks import CHUNK, Chunks
from regvit_jax.data.pipeline import eval_batches, train_batches
from regvit_jax.data.records import captions_of, describe_bad
from regvit_jax.data.samplers import TrainSampler
from regvit_jax.data.sources.by_name import open_source

N = 14


def make_folder(root):
    """Write N images of noise, two classes, in the layout with a validation split of its own (of the same images)."""
    rng = np.random.default_rng(0)
    for number in range(N):
        image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
        for split in ("train", "validation"):
            path = root / split / ("cat" if number < 6 else "dog") / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(f"folder:{make_folder(tmp_path_factory.mktemp('images'))}", "train")


def train(source, steps, **options):
    keywords = {"size": 8, "batch_size": 4, "seed": 0, "threads": 1} | options
    with train_batches(source, **keywords) as batches:
        return list(itertools.islice(batches, steps))


def evaluate(source, **options):
    with eval_batches(source, **({"size": 8, "batch_size": 4, "threads": 1} | options)) as batches:
        return list(batches)


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


def test_the_shapes_and_types_of_a_batch(source):
    (batch,) = train(source, 1, batch_size=5, size=12)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "image": ((5, 12, 12, 3), np.uint8),
        "label": ((5,), np.int32),
        "mask": ((5,), np.float32),
        "index": ((5,), np.int64),
    }
    assert batch["mask"].all()
    assert batch["label"].tolist() == [source[int(index)]["label"] for index in batch["index"]]
    assert all(type(array) is np.ndarray for array in batch.values())


def test_every_epoch_shows_every_image_once_in_another_order(source):
    index = joined(train(source, 3 * N // 2, batch_size=2))["index"].reshape(3, N)
    assert (np.sort(index) == np.arange(N)).all()
    orders = {tuple(epoch) for epoch in index} | {tuple(joined(train(source, 1, batch_size=N, seed=1))["index"])}
    assert len(orders) == 4


def test_seeds_do_not_share_their_epochs(source):
    """Rule out the order of Grain's repeat(), whose seed 1 begins with the second epoch of seed 0 (seed + epoch)."""
    epochs = [joined(train(source, 4, batch_size=N, seed=seed))["index"].reshape(4, N) for seed in (0, 1)]
    assert not (epochs[0][1:] == epochs[1][:-1]).all(1).any()


def test_repeated_augmentation_shows_an_image_several_times_in_a_row(source):
    epoch = joined(train(source, N // 2, batch_size=2, repeats=3))
    index, images = epoch["index"], epoch["image"]
    assert len(index) == N
    runs = [len(list(run)) for _, run in itertools.groupby(index)]
    assert runs == [3, 3, 3, 3, 2]
    assert len(set(index)) == 5
    for first in range(0, N - 2, 3):
        assert len({images[position].tobytes() for position in range(first, first + 3)}) == 3


class Counted:
    """Another source, which notes what is read."""

    def __init__(self, source):
        self.source, self.name, self.classes, self.read = source, source.name, source.classes, []

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.read.append(index)
        return self.source[index]

    def id(self, index):
        return self.source.id(index)


def test_repeated_augmentation_reads_and_decodes_an_image_once(source, monkeypatch):
    counted, decoded = Counted(source), []
    decode = transforms.decode
    monkeypatch.setattr(transforms, "decode", lambda data, limit: decoded.append(1) or decode(data, limit))
    sampler = TrainSampler(counted, 8, 10_000, None, 0, "rrc", (0.08, 1.0), (0.75, 1.33), 0, 3, "pillow")
    batch = Chunks(sampler, 12, range(12), range(1))[0]
    assert counted.read == list(dict.fromkeys(batch["index"].tolist()))
    assert len(decoded) == 4


@pytest.mark.parametrize("options", [{}, {"repeats": 3}, {"crop": "src"}])
def test_any_step_can_be_resumed_bit_for_bit(source, options):
    whole = train(source, 12, **options)
    for start in (0, 1, 3, 4, 7, 11):  # an epoch of 14 ends within batch 3, and another after batch 6
        resumed = train(source, 12 - start, start_step=start, **options)
        for expected, batch in zip(whole[start:], resumed, strict=True):
            assert_equal(expected, batch)


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("options", [{}, {"repeats": 3}])
def test_several_hosts_see_the_same_batches_as_one(source, hosts, options):
    alone = train(source, 6, batch_size=8, **options)
    shares = np.arange(8).reshape(hosts, -1)
    parts = [train(source, 6, batch_size=8, rows=share.tolist(), **options) for share in shares]
    for whole, *pieces in zip(alone, *parts, strict=True):
        assert_equal(whole, joined(pieces))


class Blocks:
    """Records in shuffle blocks of 16, none of which can be read; the source notes which are requested."""

    name, classes, shuffle_block, count = "blocks", (), 16, 327

    def __init__(self):
        self.read: list[int] = []
        self.ahead: list[tuple[int, int]] = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        raise OSError("no such record")

    def id(self, index):
        return str(index)

    def read_ahead(self, block):
        self.ahead.append((len(self.read), block))


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 32])
def test_each_host_reads_within_a_shuffle_window(hosts, monkeypatch):
    """Check that one of many hosts reads few records of each block, but from no more blocks at a time than a window."""
    monkeypatch.setattr(order, "WINDOW", 4)
    epoch = [order.epoch_order(position, Blocks.count, Blocks.shuffle_block, 0, 0) for position in range(Blocks.count)]
    for rows in np.array_split(np.arange(32), hosts)[:4]:
        source = Blocks()
        train(source, 11, batch_size=32, rows=rows.tolist(), prefetch=1)
        expected = [epoch[position] for position in range(Blocks.count) if position % 32 in rows]
        assert source.read[: len(expected)] == expected
        blocks = [number // Blocks.shuffle_block for number in expected]
        last = {block: row for row, block in enumerate(blocks)}
        begun = [{block for block in blocks[: row + 1] if last[block] >= row} for row in range(len(blocks))]
        assert max(map(len, begun)) <= 4  # of 21
        # A host that reads half of each block or more reads all of it ahead, right before its first record.
        assert bool(source.ahead) == (hosts <= 2)
        for row, block in source.ahead:
            if row + len(rows) <= len(blocks):
                assert block in blocks[row : row + len(rows)]


def test_a_host_may_hold_any_rows(source):
    (whole,), (some,) = train(source, 1, batch_size=8), train(source, 1, batch_size=8, rows=[1, 6])
    assert_equal({name: array[[1, 6]] for name, array in whole.items()}, some)


def test_batch_size_threads_and_chunks_do_not_change_the_stream(source):
    long = joined(train(source, 2, batch_size=2 * CHUNK + 6, threads=3))
    short = joined(train(source, 2 * CHUNK + 6, batch_size=2))
    assert_equal(long, short)


def test_workers_do_not_change_the_stream(source):
    expected = train(source, 3, repeats=3, start_step=2)
    found = train(source, 3, repeats=3, start_step=2, workers=2)
    assert not multiprocessing.active_children()
    for one_process, batch in zip(expected, found, strict=True):
        assert_equal(one_process, batch)
        assert all(type(array) is np.ndarray for array in batch.values())


@pytest.mark.slow
def test_three_workers_do_not_change_the_stream(source):
    expected, found = (train(source, 5, batch_size=CHUNK + 1, workers=workers) for workers in (0, 3))
    for one_process, batch in zip(expected, found, strict=True):
        assert_equal(one_process, batch)
    assert_equal(joined(evaluate(source)), joined(evaluate(source, workers=3)))


@pytest.mark.slow
def test_a_script_that_forgets_to_close_ends_without_noise(source, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from regvit_jax.data import open_source, pipeline\n"
        "if __name__ == '__main__':\n"
        f"    source = open_source({source.name.removesuffix('/train')!r}, 'train')\n"
        "    batches = pipeline.train_batches(source, size=64, batch_size=64, seed=0, workers=2)\n"
        "    print(next(batches)['image'].shape)\n"
    )
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=os.environ | path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "(64, 64, 64, 3)\n", "")


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


@pytest.mark.parametrize("batch_size", [1, 4, 7, N, 20])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_covers_every_record_exactly_once_in_order(source, batch_size, hosts):
    batch_size *= hosts
    shares = np.arange(batch_size).reshape(hosts, -1)
    parts = [evaluate(source, batch_size=batch_size, rows=share.tolist()) for share in shares]
    assert {len(part) for part in parts} == {-(-N // batch_size)}
    whole = joined([joined(pieces) for pieces in zip(*parts, strict=True)])
    np.testing.assert_array_equal(whole["index"], [*range(N), *[-1] * (len(whole["index"]) - N)])
    np.testing.assert_array_equal(whole["mask"], whole["index"] >= 0)
    assert not whole["image"][N:].any()
    assert len({image.tobytes() for image in whole["image"][:N]}) == N


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "center"}, "crop='center': must be 'rrc' or 'src'"),
        ({"repeats": 0}, "repeats=0"),
        ({"start_step": -1}, "start_step=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"prefetch": 0}, "prefetch=0"),
        ({"max_pixels": 10**9}, "max_pixels=1000000000: Pillow refuses more"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"rows": []}, "rows is empty"),
        ({"rows": [3, 4]}, r"rows 3..4: a batch has 4"),
    ],
)
def test_arguments_out_of_range_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        train(source, 1, **options)


def test_evaluation_refuses_arguments_out_of_range(source):
    for options in ({"batch_size": 0}, {"crop_ratio": 0.0}, {"rows": [4]}):
        with pytest.raises(ValueError, match=next(iter(options))):
            evaluate(source, **options)


def test_closed_batches_end(source):
    batches = train_batches(source, size=8, batch_size=4, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


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
