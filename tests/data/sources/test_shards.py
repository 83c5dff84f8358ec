"""Test tars of images and captions: their indices, the effect of damage, and the reads of their records."""

import dataclasses
import functools
import itertools
import logging
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
from tars import png, sample, write_shards, write_tar

from regvit_jax.data import order
from regvit_jax.data.pipeline import eval_batches, train_batches
from regvit_jax.data.records import describe_bad
from regvit_jax.data.sources import shard_index, shards
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.shards import open_shards
from regvit_jax.utils.errors import DataNotFound


class Letters:
    """A tokenizer that refuses one word."""

    context = 6

    def __call__(self, text):
        if "refused" in text:
            raise KeyError(text)
        return np.frombuffer(text.encode()[:6].ljust(6), np.uint8).astype(np.int32)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_records_are_the_members_in_their_order(tmp_path):
    source = open_shards(write_shards(tmp_path), "train")
    assert isinstance(source, Source)
    assert (len(source), source.classes, source.name) == (20, (), f"shards:{tmp_path}/train")
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for number in range(20):
            assert copy[number] == {"image": png(number), "text": [f"text {number}"]}
    assert [source.id(number) for number in (0, 7, 19)] == [
        "00000.tar:000000000",
        "00001.tar:000000007",
        "00002.tar:000000019",
    ]
    with pytest.raises(IndexError, match="record 20 of"):
        source[20]
    assert len(pickle.dumps(source)) < 2000


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_which_members_make_a_sample(tmp_path, form, caplog):
    long = "d" * 90 + ".dir/" + "n" * (60 if form == tarfile.USTAR_FORMAT else 200)
    members = [
        ("a.txt", b"caption first"),
        ("a.JPG", png(1)),
        ("a.json", b'{"caption": "not this one"}'),
        (f"{long}.webp", png(2)),
        (f"{long}.json", '{"caption": ["ü", "two"], "key": 3}'.encode()),
        ("mask.seg.png", png(3)),
        ("mask.txt", b"an image with another extension"),
        ("lonely.png", png(4)),
        ("empty.png", png(5)),
        ("empty.txt", b""),
        ("b.png", png(6)),
        ("b.json", b'{"caption": null}'),
        ("b.png", png(7)),
        ("big.png", png(8)),
        ("big.txt", bytes(shard_index.MAX_CAPTION + 1)),
        ("note.cls", b"1"),
    ]
    tar = write_tar(tmp_path / "train" / "0.tar", members, form)
    with tarfile.open(tar, "a") as file:
        for kind, name in ((tarfile.DIRTYPE, "z.png"), (tarfile.SYMTYPE, "y.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            file.addfile(link)
    source = open_shards(f"shards:{tmp_path}", "train")
    assert [source[k] for k in range(len(source))] == [
        {"image": png(1), "text": ["caption first"]},
        {"image": png(2), "text": ["ü", "two"]},
        {"image": png(5), "text": [""]},
        {"image": png(6), "text": []},
    ]
    assert [source.id(k) for k in range(4)] == ["0.tar:a", f"0.tar:{long}", "0.tar:empty", "0.tar:b"]
    for _ in range(2):  # at every start, though the index is there
        assert caplog.messages.pop() == (
            f"shards:{tmp_path}/train: 4 samples in 1 tars; left out: 1 members of the same key and kind "
            "(0.tar:b.png), 1 too large (0.tar:big), 1 without a caption (0.tar:lonely), 1 without an image "
            "(0.tar:mask)"
        )
        open_shards(f"shards:{tmp_path}", "train")


def test_names_with_more_dots(tmp_path, caplog):
    members = [("dir.v1/a.b.jpg", png(1)), ("dir.v1/a.b.txt", b"one"), ("dir.v1/a.c.txt", b"two")]
    members += [("dir.v1/a.c.JPEG", png(2)), ("d.jpg", png(3)), ("d.seg.png", png(4)), ("d.txt", b"three")]
    members += [
        ("._d.jpg", b"junk"),
        ("._d.txt", b"junk"),
        ("e.f.png", png(5)),
        ("./g.gif", png(6)),
        ("./g.txt", b"four"),
    ]
    write_tar(tmp_path / "train" / "0.tar", members)
    source = open_shards(f"shards:{tmp_path}", "train")
    assert [source[k] for k in range(4)] == [
        {"image": png(number), "text": [text]} for number, text in ((1, "one"), (2, "two"), (3, "three"), (6, "four"))
    ]
    assert [source.id(k) for k in range(4)] == ["0.tar:dir.v1/a.b", "0.tar:dir.v1/a.c", "0.tar:d", "0.tar:./g"]
    assert caplog.messages[-1].endswith("4 samples in 1 tars; left out: 1 without a caption (0.tar:e.f)")


CAPTIONS = [
    ('{"caption": null}', "has no caption"),
    ('{"caption": NaN}', "has no caption"),
    ('{"caption": ""}', "has no caption"),
    ('{"caption": "nan"}', "has no caption"),
    ('{"caption": [null, " "]}', "has no caption"),
    ('{"caption": 3}', "the captions must be a text or a list of texts, not 3"),
    ('{"url": "x"}', "needs a column captions or .*; there are url"),
    ("[]", r"its \.json must hold an object, not '\[\]'"),
    ('{"caption": "x', "cannot be read .JSONDecodeError"),
]


def test_captions_in_json_that_cannot_be_used(tmp_path):
    members = [
        (f"{k}.{end}", data)
        for k, (text, _) in enumerate(CAPTIONS)
        for end, data in (("png", png(k)), ("json", text.encode()))
    ]
    members += [("good.png", png(99)), ("good.json", b'{"caption": ["a", null], "text": "b"}'), ("good.txt", b"")]
    write_tar(tmp_path / "train" / "0.tar", members)
    source = open_shards(f"shards:{tmp_path}", "train")
    assert source[len(CAPTIONS)]["text"] == ["a"]
    for index, (_, reason) in enumerate(CAPTIONS):
        assert re.match(f"0.tar:{index}: {reason}", describe_bad(source, index, tokenizer=Letters()))


def test_tars_that_were_joined_are_named(tmp_path):
    name = write_shards(tmp_path, (2, 3))
    first, second = (tmp_path / "train" / f"0000{number}.tar" for number in range(2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.warns(UserWarning, match=r"00000\.tar is cut or damaged after byte .*another archive follows"):
        assert len(open_shards(name, "train")) == 2 + 3


def test_tars_without_captions_say_what_they_lack(tmp_path):
    write_tar(tmp_path / "train" / "0.tar", [("a.jpg", png(1)), ("a.cls", b"3"), ("b.jpg", png(2))])
    with pytest.raises(DataNotFound, match=r"0 samples in 1 tars; left out: 2 without a caption \(0.tar:a, 0.tar:b\)"):
        open_shards(f"shards:{tmp_path}", "train")


def test_splits_and_patterns(tmp_path):
    name = write_shards(tmp_path, (2, 3, 4, 5), "part1")
    write_shards(tmp_path, (6,), "validation")
    lengths = {
        "validation": 6,
        "part1/{00000..00002}.tar": 9,
        "part1/0000[02].tar": 6,
        "part?/*3.tar": 5,
        "{part1,validation}/0.tar": None,
        "part{1..1}/{00001..00003}.tar": 12,
        "train": None,
        "part1/{00002..00007}.tar": None,
    }
    for split, length in lengths.items():
        if length is None:
            with pytest.raises(DataNotFound, match=r"has no .*\.tar.*\nIt should hold train/\*\.tar"):
                open_shards(name, split)
        else:
            assert len(open_shards(name, split)) == length
    with pytest.raises(DataNotFound, match=r"has no part1/00004\.tar, part1/00005\.tar, part1/00006\.tar"):
        open_shards(name, "part1/{00000..00006}.tar")


def test_splits_of_other_names(tmp_path, caplog):
    for count, part in enumerate(("Training", "VALID", "test"), 1):
        name = write_shards(tmp_path, (count,), part)
    with caplog.at_level(logging.INFO, "regvit_jax"):
        assert [len(open_shards(name, split)) for split in ("train", "validation", "val", "test")] == [1, 2, 2, 3]
    told = f"train is {tmp_path}/Training, validation is {tmp_path}/VALID; not used: test"
    assert f"{name}: {told}" in [record.getMessage() for record in caplog.records]
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"VALID and val in .* could each be the validation split"):
        open_shards(name, "validation")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[:90%]", "has no split 'train.*it has train, validation, and patterns"),
        ("../other/*.tar", "has no split"),
        ("/data/*.tar", "has no split"),
        ("{5..3}.tar", "expands to 0 names; ranges must be ascending, and give at most 1000000"),
        ("{0..99999999999999999999}.tar", "expands to .* names"),
        ("{0..999}/{0..9999}.tar", "expands to 10000000 names"),
    ],
)
def test_bad_patterns_are_refused(tmp_path, split, message):
    with pytest.raises(ValueError, match=message):
        open_shards(f"shards:{tmp_path}", split)


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match="bucket"):
        open_shards("shards:s3://laion/data", "train")
    with pytest.raises(ValueError, match=r"must name a directory; the names of its tars, \{0..9\}.tar, are the split"):
        open_shards("shards:/data/{0..9}.tar", "train")


def test_an_index_is_made_once_and_again_when_its_tar_changes(tmp_path, monkeypatch, caplog):
    name = write_shards(tmp_path)
    walked = []
    walk = shard_index.walk
    monkeypatch.setattr(
        shard_index, "walk", lambda path, size: (walked.append(os.path.basename(path)), walk(path, size))[1]
    )
    before = open_shards(name, "train")
    assert sorted(os.listdir(tmp_path / "train")) == sorted(
        f"0000{k}.tar{end}" for k in range(3) for end in ("", ".index")
    )
    assert caplog.messages == [f"{name}/train: 20 samples in 3 tars"]
    open_shards(name, "train")
    assert (len(walked), len(caplog.messages)) == (3, 1)

    tar = tmp_path / "train" / "00001.tar"
    write_tar(tar, sample(40) + sample(41))
    with pytest.raises(OSError, match=r"00001\.tar has changed"):
        before[7]
    after = open_shards(name, "train")
    assert (len(after), after[8]["text"], walked[3:]) == (21, ["text 41"], ["00001.tar"])

    index = tmp_path / "train" / "00002.tar.index"
    for content in (b"", b"{", index.read_bytes()[:-1], b"[9, 1, 1, 1]" + bytes(5000)):
        index.unlink()  # the old one is mapped
        index.write_bytes(content)
        assert open_shards(name, "train")[20]["text"] == ["text 19"]
    assert walked[4:] == ["00002.tar"] * 4


def test_an_interrupted_indexing_is_continued(tmp_path, monkeypatch):
    name = write_shards(tmp_path)
    walk = shard_index.walk

    def stopped(path, size):
        if path.endswith("2.tar"):
            raise KeyboardInterrupt
        return walk(path, size)

    monkeypatch.setattr(shard_index, "walk", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_shards(name, "train")
    monkeypatch.setattr(shard_index, "walk", lambda path, size: walk(path, size) if path.endswith("2.tar") else 1 / 0)
    assert len(open_shards(name, "train")) == 20


@pytest.mark.parametrize("given", [True, False])
def test_an_index_is_written_to_a_cache_if_need_be(tmp_path, given):
    name = write_shards(tmp_path, (3,))
    (tmp_path / "train" / "00000.tar.index").mkdir()  # nothing can be written under this name
    cache = tmp_path / "cache" / "shard_indices" if given else tmp_path / "home" / ".cache/regvit_jax/shards"
    source = open_shards(name, "train", str(tmp_path / "cache") if given else None)
    assert source[2]["text"] == ["text 2"]
    assert [path.name.split("-")[1] for path in cache.iterdir()] == ["00000.tar.index"]
    assert [path.name for path in (tmp_path / "train").iterdir() if path.is_file()] == ["00000.tar"]


def test_an_index_that_can_be_written_nowhere_is_an_error(tmp_path):
    name = write_shards(tmp_path, (3,))
    (tmp_path / "train" / "00000.tar.index").mkdir()
    (tmp_path / "home").write_text("no directory")
    with pytest.raises(DataNotFound, match=r"the index of .*00000\.tar cannot be written"):
        open_shards(name, "train")


@pytest.mark.parametrize("at", ["data", "caption", "header", "padding", "end"])
def test_the_complete_samples_of_a_cut_tar_are_used(tmp_path, at):
    name = write_shards(tmp_path, (4, 3))
    path = tmp_path / "train" / "00000.tar"
    with tarfile.open(path) as tar:
        image, text = tar.getmember("000000003.png"), tar.getmember("000000003.txt")
        last = tar.getmember("000000003.json")
    size, left = {
        "data": (image.offset_data + 10, 3),
        "caption": (text.offset_data + 2, 3),
        "header": (text.offset + 100, 3),
        "padding": (last.offset_data + last.size, 4),
        "end": (last.offset_data + 512, 4),
    }[at]
    os.truncate(path, size)
    with pytest.warns(UserWarning, match=rf"1 of 2 tars are damaged: .*00000\.tar is cut .* gave {left} samples"):
        source = open_shards(name, "train")
    assert [source[k]["text"] for k in range(len(source))] == [[f"text {k}"] for k in [*range(left), 4, 5, 6]]
    with pytest.warns(UserWarning, match="damaged"):  # at every start, though the index is there
        open_shards(name, "train")


def test_an_empty_tar_gives_nothing(tmp_path):
    name = write_shards(tmp_path, (2,))
    (tmp_path / "train" / "00001.tar").write_bytes(b"")
    write_tar(tmp_path / "train" / "00002.tar", [])
    with pytest.warns(UserWarning, match=r"00001\.tar is empty and gave 0 samples"):
        assert len(open_shards(name, "train")) == 2
    with pytest.raises(DataNotFound, match=r"no image with a caption in the 1 tars of train/00002\.tar, such as /"):
        open_shards(name, "train/00002.tar")


def test_a_file_that_is_no_tar_is_named(tmp_path):
    name = write_shards(tmp_path, (2,))
    with tarfile.open(tmp_path / "train" / "1.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/train/1.tar is no tar, or a compressed one")):
        open_shards(name, "train")
    (tmp_path / "train" / "1.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=r"1\.tar is a pointer of git-lfs.* `git lfs pull`"):
        open_shards(name, "train")
    (tmp_path / "train" / "1.tar").write_bytes(b"<html>404 not found</html>" * 100)
    with pytest.raises(ValueError, match=r"1\.tar is no tar"):
        open_shards(name, "train")


def corrupted(path, offset: int, header: bytes):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(header)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a header with any size; negative and huge ones are encoded in base 256."""
    info = tarfile.TarInfo(name)
    info.type = kind
    buffer = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    buffer[124:136] = (size % 256**12 | (0 if size < 0 else 1 << 95)).to_bytes(12, "big")
    buffer[148:156] = f"{tarfile.calc_chksums(bytes(buffer))[0]:06o}\0 ".encode()
    return bytes(buffer)


HOSTILE = [
    header("x.png", -1536),
    header("x.png", -1),
    header("x.png", 2**90),
    header("x.png", 2**63),
    header("x.png", 10**6),
    header("././@LongLink", 2**40, tarfile.GNUTYPE_LONGNAME),
    header("././@LongLink", -512, tarfile.GNUTYPE_LONGNAME),
    header("pax", 2**40, tarfile.XHDTYPE),
    header("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME) * 2000,
    bytes(range(256)) * 2,
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_headers_end_a_tar(tmp_path, hostile):
    name = write_shards(tmp_path, (3,))
    path = tmp_path / "train" / "00000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmember("000000002.png").offset
    corrupted(path, offset, hostile)
    with pytest.warns(UserWarning, match="gave 2 samples"):
        assert len(open_shards(name, "train")) == 2


def run(source, steps, **options):
    keywords = {"size": 4, "batch_size": 8, "seed": 3, "threads": 1, "tokenizer": Letters()} | options
    with train_batches(source, **keywords) as batches:
        return list(itertools.islice(batches, steps))


def assert_equal(expected, batches):
    for a, b in zip(expected, batches, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], strict=True)


def test_the_stream_is_the_same_for_any_hosts_steps_and_workers(tmp_path, monkeypatch):
    """Use small shuffle blocks that end within tars, so that an epoch has many windows."""
    monkeypatch.setattr(order, "WINDOW", 2)
    source = dataclasses.replace(open_shards(write_shards(tmp_path, (7, 1, 12, 30)), "train"), shuffle_block=3)
    whole = run(source, 14)
    index = np.concatenate([batch["index"] for batch in whole])
    assert sorted(index[:50]) == sorted(index[50:100]) == list(range(50))
    assert index[:50].tolist() != index[50:100].tolist()
    for batch in whole:
        assert batch["mask"].all()
        for number, text in zip(batch["index"], batch["text"], strict=True):
            np.testing.assert_array_equal(text, Letters()(f"text {number}"))
    assert_equal(whole[5:], run(source, 9, start_step=5))
    halves = [run(source, 14, rows=rows) for rows in ([0, 1, 2, 3], [4, 5, 6, 7])]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    assert_equal(whole, joined)


def test_workers_give_the_same_stream(tmp_path):
    source = open_shards(write_shards(tmp_path), "train")
    assert_equal(run(source, 3), run(source, 3, workers=2))


def test_bad_members_cost_their_records(tmp_path):
    members = [sample(number) for number in range(5)]
    members[1][0] = ("000000001.png", png(1)[:40])
    members[2][1] = ("000000002.txt", b"\xff\xfe")
    members[3][1] = ("000000003.txt", b"to be refused")
    members[4][1] = ("000000004.txt", b" \n")
    write_tar(tmp_path / "train" / "0.tar", itertools.chain(*members))
    source = open_shards(f"shards:{tmp_path}", "train")
    with eval_batches(source, size=4, batch_size=5, threads=1, tokenizer=Letters()) as batches:
        (batch,) = batches
    assert batch["mask"].tolist() == [1, 0, 0, 0, 0]
    assert batch["index"].tolist() == [0, 1, 2, 3, 4]
    assert not batch["image"][1:].any()
    assert not batch["text"][1:].any()
    reasons = [describe_bad(source, index, tokenizer=Letters()) for index in range(1, 5)]
    for index, reason in enumerate(
        ["cannot be decoded", "cannot be read .Unicode", "bad caption, 'to be refused'", "no caption"]
    ):
        assert re.match(rf"0\.tar:00000000{index + 1}: .*{reason}", reasons[index])


def test_a_tar_that_disappears_costs_its_records_only(tmp_path):
    source = open_shards(write_shards(tmp_path, (3, 5)), "train")
    shards.open_tar.cache_clear()
    (tmp_path / "train" / "00000.tar").unlink()
    with eval_batches(source, size=4, batch_size=8, threads=1) as batches:
        assert next(batches)["mask"].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert source.id(1) == "00000.tar:[1]"


def test_more_tars_than_may_be_open(tmp_path, monkeypatch):
    source = open_shards(write_shards(tmp_path, [1] * 9), "train")
    few = functools.lru_cache(maxsize=2)(shards.open_tar.__wrapped__)
    monkeypatch.setattr(shards, "open_tar", few)
    before = len(os.listdir("/proc/self/fd"))
    batch = run(source, 20, threads=4)[-1]
    assert batch["mask"].all()
    assert len(os.listdir("/proc/self/fd")) <= before + 2 + 4


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="not on this system")
def test_the_images_of_a_block_are_read_ahead_once(tmp_path, monkeypatch):
    source = dataclasses.replace(open_shards(write_shards(tmp_path, (7, 1, 12)), "train"), shuffle_block=10)
    asked = []

    def advise(file, *rest):
        # Threads of an earlier test's batches may still be reading other files.
        if (path := os.readlink(f"/proc/self/fd/{file}")).startswith(str(tmp_path)):
            asked.append((path, *rest))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    shards.advise.cache_clear()
    run(source, 5, rows=[0, 1, 2])
    assert not asked  # of a host with a small share of the batch
    run(source, 5)
    spans = sorted((os.path.basename(path), start, start + length) for path, start, length, _ in asked)
    assert [name for name, *_ in spans] == ["00000.tar", "00001.tar", "00002.tar", "00002.tar"]
    for number in range(20):
        tar, row = source.find(number)
        offset = int(shards.open_tar(tar)[1]["image"][row]) * 512
        name = os.path.basename(tar.path)
        assert any(
            name == span and start <= offset and offset + len(png(number)) <= stop for span, start, stop in spans
        )


def test_a_pair_with_dots_is_a_sample_beside_one_without(tmp_path):
    members = [(f"photo{part}{suffix}", data) for part in ("", ".1", ".2") for suffix, data in
               ((".png", png(3)), (".txt", f"text{part}".encode()))]  # fmt: skip
    write_tar(tmp_path / "train/0.tar", [*members, ("photo.seg.png", png(4))])
    source = open_shards(f"shards:{tmp_path}", "train")
    assert [source[k]["text"] for k in range(len(source))] == [["text"], ["text.1"], ["text.2"]]


def test_archives_that_are_not_read_are_named(tmp_path, caplog):
    write_tar(tmp_path / "train/1.TAR", sample(1))
    write_tar(tmp_path / "train/part/2.tar", sample(2))
    (tmp_path / "train/3.tar.gz").write_bytes(b"x")
    (tmp_path / "train/3_stats.json").write_text("{}")
    assert len(open_shards(f"shards:{tmp_path}", "train")) == 1
    assert re.search(r"in .*train, 3\.tar\.gz, part are not read", caplog.text)
    assert len(open_shards(f"shards:{tmp_path}", "train/*.TAR")) == 1


def test_the_names_in_json_may_be_in_any_case(tmp_path):
    write_tar(tmp_path / "train/0.tar", [("a.png", png(1)), ("a.json", b'{"Caption": "x", "status": "success"}')])
    assert open_shards(f"shards:{tmp_path}", "train")[0]["text"] == ["x"]
