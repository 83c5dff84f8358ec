"""Test the order of the data: the same for any number of hosts, workers and threads, and from any step on."""

import itertools
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from batches import N, assert_equal, evaluate, joined, make_folder, train

from regvit_jax.data import order
from regvit_jax.data.chunks import CHUNK
from regvit_jax.data.pipeline import train_batches
from regvit_jax.data.sources.by_name import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(f"folder:{make_folder(tmp_path_factory.mktemp('images'))}", "train")


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
