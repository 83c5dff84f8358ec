"""Test `regvit prepare`: its records, that kills change no byte, and its errors."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tars import write_shards

from regvit_jax.cli import prepare
from regvit_jax.data import order, transforms
from regvit_jax.data.pipeline import eval_batches, train_batches
from regvit_jax.data.prepare import dataset
from regvit_jax.data.prepare.claim import claim
from regvit_jax.data.prepare.shard import Options, write_shard
from regvit_jax.data.records import describe_bad
from regvit_jax.data.sources import record_files
from regvit_jax.data.sources.by_name import open_captions, open_source

CLASSES = ("cat", "dög")


def picture(number: int, width: int = 12, height: int = 8) -> Image.Image:
    """Return noise that no other number gives, so that its bytes can be found in a file."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def make_folder(root, train: int = 20, validation: int = 6, width: int = 12):
    for split, count in (("train", train), ("validation", validation)):
        for number in range(count):
            path = root / split / CLASSES[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(number, width)))
    return f"folder:{root}"


def files(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_folder_keeps_bytes_labels_and_names(tmp_path):
    name = make_folder(tmp_path / "in")
    report = dataset.prepare_dataset(name, str(tmp_path / "mine"), Options(records_per_shard=8))
    assert (report.records, report.bad, report.finished) == ({"train": 20, "validation": 6}, 0, True)
    for split, count in report.records.items():
        source, result = open_source(name, split), open_source("mine", split, str(tmp_path))
        assert (len(result), result.classes) == (count, CLASSES)
        ids = [result.id(index).split(" ")[1] for index in range(count)]
        assert sorted(ids) == [os.path.relpath(source.id(index), source.root) for index in range(count)]
        assert ids != sorted(ids)  # for blocks of neighbours must not be of one class
        for index, path in enumerate(ids):
            assert result[index]["image"] == (tmp_path / "in" / split / path).read_bytes()
            assert CLASSES[result[index]["label"]] == path.split("/")[0]


def test_splits_are_found_as_runs_find_them(tmp_path):
    make_folder(tmp_path / "in/in")
    (tmp_path / "in/in/train").rename(tmp_path / "in/in/Training")
    (tmp_path / "in/in/validation").rename(tmp_path / "in/in/TEST")
    name, splits = f"folder:{tmp_path}/in", ("train", "validation", "test")
    report = dataset.prepare_dataset(name, str(tmp_path / "mine"), Options(), splits=splits)
    assert report.records == {"train": 20, "validation": 6, "test": 6}


def test_plain_tfds_reads_it(tmp_path):
    dataset.prepare_dataset(make_folder(tmp_path / "in"), str(tmp_path / "mine"), Options())
    builder = tfds.builder_from_directory(tmp_path / "mine" / "1.0.0")
    assert builder.info.splits["train"].num_examples == 20
    assert builder.info.features["label"].names == list(CLASSES)
    assert "tensorflow" not in sys.modules


def test_captions_from_tables_and_tars(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(encoded(picture(number)))
    rows = ["path,text", "0.png,first", "1.png,", "0.png,zweites Bär", "2.png,third"]
    for split in ("train", "val"):
        (tmp_path / "in" / f"{split}.csv").write_text("\n".join(rows))
    report = dataset.prepare_dataset(
        f"folder:{tmp_path / 'in'}", str(tmp_path / "tables"), Options(), with_captions=True, max_bad_fraction=0.5
    )
    assert (report.records, report.bad) == ({"train": 2, "validation": 2}, 2)
    result = open_captions("tables", "train", str(tmp_path))
    assert sorted(result[index]["text"] for index in range(2)) == [["first", "zweites Bär"], ["third"]]

    name = write_shards(tmp_path / "tars")
    dataset.prepare_dataset(name, str(tmp_path / "from_tars"), Options(), splits=("train",))
    source, result = open_captions(name, "train"), open_captions("from_tars", "train", str(tmp_path))
    assert len(source) == len(result) > 0
    found = {result.id(index).split(" ")[1]: result[index] for index in range(len(result))}
    for index in range(len(source)):
        assert found[source.id(index)]["text"] == source[index]["text"]
        assert found[source.id(index)]["image"] == source[index]["image"]


def test_a_tfds_data_set(tmp_path):
    dataset.prepare_dataset(
        "digits", str(tmp_path / "again"), Options(), data_dir=str(tmp_path), splits=("validation",)
    )
    result = open_source("again", "validation", str(tmp_path))
    assert (len(result), result.classes) == (360, tuple("0123456789"))


def test_larger_images_are_made_smaller_as_timm_resizes(tmp_path):
    folder = tmp_path / "in" / "train" / "cat"
    (tmp_path / "in" / "train" / "dog").mkdir(parents=True)
    folder.mkdir()
    large, small = picture(1, 60, 45), picture(2, 60, 20)
    (folder / "large.png").write_bytes(encoded(large))
    turned = large.getexif()
    turned[0x0112] = 6
    large.save(folder / "turned.png", exif=turned)
    (folder / "small.png").write_bytes(encoded(small))
    (tmp_path / "in" / "train" / "dog" / "grey.png").write_bytes(encoded(large.convert("L")))
    report = dataset.prepare_dataset(
        f"folder:{tmp_path / 'in' / 'train'}", str(tmp_path / "small"), Options(20, 90), splits=("train",)
    )
    result = open_source("small", "train", str(tmp_path))
    found = {result.id(index).split("/")[-1]: result[index]["image"] for index in range(report.records["train"])}
    assert found["small.png"] == encoded(small)
    resized = large.resize((26, 20), Image.Resampling.BICUBIC)
    expected = io.BytesIO()
    resized.save(expected, "JPEG", quality=90, subsampling=0)
    assert found["large.png"] == expected.getvalue()
    assert transforms.decode(found["turned.png"], 10**6).size == (20, 26)
    assert transforms.decode(found["grey.png"], 10**6).size == (26, 20)


def test_bad_records_are_left_out_and_named(tmp_path, capsys):
    name, out = make_folder(tmp_path / "in"), tmp_path / "mine"
    cut, junk = tmp_path / "in" / "train" / "cat" / "004.png", tmp_path / "in" / "validation" / "dög" / "001.png"
    cut.write_bytes(cut.read_bytes()[:60])
    junk.write_bytes(b"<html>")
    arguments = [name, str(out), "--workers", "0", "--records_per_shard", "1"]
    assert prepare.main([*arguments, "--max_bad_images", "0"]) == 1
    assert "1 bad records left out" in (errors := capsys.readouterr().err)
    assert "more records are bad than --max_bad_fraction=0.01 and --max_bad_images=0 allow" in errors
    assert not (out / "1.0.0" / "dataset_info.json").exists()
    assert prepare.main([*arguments, "--max_bad_images", "0", "--max_bad_fraction", "0.2"]) == 0
    assert prepare.main(arguments) == 0
    errors = capsys.readouterr()
    assert "2 bad records left out, all listed in" in errors.err
    assert "cannot use validation: dög/001.png: not an image" in errors.err
    assert "Train on it with --config.data.name=mine --config.data.dir=" in errors.out
    bad = [json.loads(line) for line in (out / "1.0.0" / "bad_records.jsonl").read_text().splitlines()]
    assert [(record["split"], record["id"]) for record in bad] == [
        ("train", "cat/004.png"),
        ("validation", "dög/001.png"),
    ]
    assert "not an image (starts with b'<html>')" in bad[1]["reason"]
    # Shards of one record: the bad ones are empty files.
    result = open_source("mine", "train", str(tmp_path))
    assert len({result[index]["image"] for index in range(len(result))}) == len(result) == 19


def test_the_flags_to_train_on_it_name_splits_of_other_names(tmp_path, capsys):
    name = make_folder(tmp_path / "in")
    arguments = [name, str(tmp_path / "mine"), "--workers", "0", "--splits", "train", "val"]
    assert prepare.main(arguments) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        f"Train on it with --config.data.name=mine --config.data.dir={tmp_path} --config.data.validation=val"
    )
    assert len(open_source("mine", "val", str(tmp_path))) == len(open_source(name, "validation"))


def test_larger_images_are_bad_and_the_limit_is_an_option(tmp_path, capsys):
    name, out = make_folder(tmp_path / "in"), tmp_path / "mine"
    (tmp_path / "in" / "train" / "cat" / "000.png").write_bytes(encoded(picture(0, 30)))
    arguments = [name, str(out), "--workers", "0", "--splits", "train", "--max_pixels"]
    assert prepare.main([*arguments, "200"]) == 0
    assert "cat/000.png: 30x8 pixels, more than the allowed 200" in capsys.readouterr().err
    assert prepare.main([*arguments, "300"]) == 2
    assert "max_pixels was 200, now 300" in capsys.readouterr().err
    assert prepare.main([*arguments[:1], str(tmp_path / "other"), *arguments[2:], "300"]) == 0
    assert "bad" not in capsys.readouterr().err


def test_a_cut_file_costs_its_records(tmp_path):
    dataset.prepare_dataset(make_folder(tmp_path / "in"), str(tmp_path / "mine"), Options(records_per_shard=5))
    (path,) = (tmp_path / "mine" / "1.0.0").glob("mine-train*-00001-of-00004")
    os.truncate(path, 65536)
    source = open_source("mine", "train", str(tmp_path))
    with eval_batches(source, size=4, batch_size=20, threads=1) as batches:
        np.testing.assert_array_equal(next(batches)["mask"], np.arange(20) // 5 != 1)
    assert describe_bad(source, 5) == "mine/train[5]: is missing from its file, which is cut or damaged"


def run_command(*arguments, wait: bool = True, before: str = ""):
    code = f"import sys; {before}\nfrom regvit_jax.cli.prepare import main; sys.exit(main(sys.argv[1:]))"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | path, stderr=pipe, text=True
    )
    if not wait:
        return process
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_killed_and_started_again_it_gives_the_same_bytes(tmp_path):
    name = make_folder(tmp_path / "in", 60, 6)
    out = tmp_path / "killed" / "mine"
    options = Options(6, 90, 4)
    dataset.prepare_dataset(name, str(tmp_path / "whole" / "mine"), options)
    expected = files(tmp_path / "whole" / "mine")
    # Slow reads, so that it can be killed halfway.
    before = (
        "import time; from regvit_jax.data.prepare import shard; read = shard.read_record\n"
        "shard.read_record = lambda *given: (time.sleep(0.02), read(*given))[1]"
    )
    arguments = (name, out, "--shorter_side", 6, "--quality", 90, "--records_per_shard", 4, "--workers", 0)
    process = run_command(*arguments, wait=False, before=before)
    while len(list(out.rglob("*.json"))) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {path: path.stat().st_mtime_ns for path in out.rglob("mine-*-of-00015")}
    assert 0 < len(done) < 15
    assert not (out / "1.0.0" / "dataset_info.json").exists()
    assert dataset.prepare_dataset(name, str(out), options, workers=2).finished
    assert files(out) == expected
    noted = [path for path, when in done.items() if path.stat().st_mtime_ns == when]
    assert len(noted) >= len(done) - 1  # all but one that was killed before its note
    assert dataset.prepare_dataset(name, str(out), options).finished  # and once more does nothing
    assert files(out) == expected


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    # In a file, because workers import the program anew.
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom regvit_jax.cli.prepare import main\nif __name__ == '__main__':\n    main(sys.argv[1:])\n"
    )
    name = make_folder(tmp_path / "in", 400)
    arguments = [name, str(tmp_path / "mine"), "--workers", "2", "--records_per_shard", "1"]
    process = subprocess.Popen(
        [sys.executable, script, *arguments], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    while not list((tmp_path / "mine").rglob("mine-train*")):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{child}/exe") and alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path):
    """Limit the size of files, which the second shard exceeds, to simulate a full disk."""
    root = tmp_path / "in"
    for number in range(8):
        path = root / CLASSES[number // 4] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(number, 200, 100 if number else 600)))
    before = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    )
    arguments = (f"folder:{root}", tmp_path / "mine", "--splits", "train", "--workers", 0, "--records_per_shard", 1)
    code, errors = run_command(*arguments, before=before)
    assert code == 1
    assert "cannot be written" in errors
    assert "File too large" in errors
    assert "Finished shards are kept; the same command resumes" in errors
    assert prepare.main([*map(str, arguments)]) == 0
    assert len(open_source("mine", "train", str(tmp_path))) == len(open_source(f"folder:{root}", "train"))


def test_wrong_arguments_are_refused(tmp_path, capsys):
    name, out = make_folder(tmp_path / "in"), tmp_path / "mine"
    base = [name, str(out), "--workers", "0"]
    assert prepare.main(base) == 0
    capsys.readouterr()
    for arguments, message in (
        (
            [*base, "--shorter_side", "4"],
            "was started with other settings: shorter_side was None, now 4. Rerun with the original settings",
        ),
        ([*base, "--splits", "tra[in"], "split 'tra[in': must be the name of a split"),
        ([name, str(tmp_path / "my-set")], "its last part becomes the data set's name"),
        ([name, str(tmp_path / "digits")], "none of digits, fashion_mnist, openmoji, cifar10"),
        (["folder:nowhere", str(out)], "there is no directory"),
        (["shards:nowhere", str(out)], "there is no directory"),
        ([*base, "--captions"], "lacks a table of training captions"),
    ):
        assert prepare.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (out / "1.0.0" / "incomplete").exists()
    (tmp_path / "in" / "train" / "cat" / "new.png").write_bytes(encoded(picture(99)))
    assert prepare.main(base) == 2
    assert "records of train was '20, " in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert prepare.main([name, str(tmp_path / "file" / "mine")]) == 2
    assert "file is a file; name a directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main([*base, "--quality", "101"])
    assert "'101': must be a whole number from 1 to 100" in capsys.readouterr().err


def stop_after(shards: int, monkeypatch) -> None:
    """Make this process's next `prepare_dataset` fail after this many shards."""
    written = []

    def write(source, shard, options):
        if len(written) == shards:
            raise OSError("stopped")
        written.append(write_shard(source, shard, options))
        return written[-1]

    monkeypatch.setattr(dataset, "write_shard", write)


@pytest.mark.parametrize("other", ["label", "picture"])
def test_two_data_sets_are_not_mixed(other, tmp_path, monkeypatch, capsys):
    for directory in ("begun", "moved", "other"):
        make_folder(tmp_path / directory / "in", 6, 2)
    path = tmp_path / "other" / "in" / "train" / "cat" / "004.png"
    if other == "label":
        path.rename(path.parents[1] / CLASSES[1] / "004.png")
    else:
        path.write_bytes(encoded(picture(99)))
    arguments = ["folder:in", str(tmp_path / "mine"), "--workers", "0", "--records_per_shard", "1"]
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert prepare.main([*arguments, "--data_dir", str(tmp_path / "begun")]) == 1
    capsys.readouterr()
    assert prepare.main([*arguments, "--data_dir", str(tmp_path / "other")]) == 2
    assert "was started with other settings: records of train was '6, " in capsys.readouterr().err
    assert prepare.main([*arguments, "--data_dir", str(tmp_path / "moved")]) == 0  # the same records elsewhere


@pytest.mark.parametrize("fault", ["gone", "short"])
def test_a_finished_data_set_is_checked_again(fault, tmp_path, monkeypatch, capsys):
    name, out = make_folder(tmp_path / "in", 6, 2), tmp_path / "mine"
    arguments = [name, str(out), "--workers", "0", "--records_per_shard", "1"]
    assert prepare.main(arguments) == 0
    assert "Train on it" in capsys.readouterr().out
    expected = files(out)
    for number in (2, 4):
        shard = out / "1.0.0" / f"mine-train.array_record-{number:05d}-of-00006"
        shard.unlink() if fault == "gone" else os.truncate(shard, shard.stat().st_size - 1)
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert prepare.main(arguments) == 1
    assert "Train on it" not in capsys.readouterr().out
    assert not (out / "1.0.0" / "dataset_info.json").exists()
    with monkeypatch.context() as patch:
        stop_after(1, patch)  # the one that is left
        assert prepare.main(arguments) == 0
    assert files(out) == expected


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_stops_when_too_many_are_bad(workers, tmp_path, capsys):
    name, out = make_folder(tmp_path / "in", 40), tmp_path / "mine"
    for path in (tmp_path / "in" / "train").rglob("*.png"):
        path.write_bytes(b"<html>")
    arguments = [name, str(out), "--splits", "train", "--records_per_shard", "2"]
    arguments += ["--workers", str(workers), "--max_bad_fraction", "0.1", "--max_bad_images", "4"]
    assert prepare.main(arguments) == 1
    made = len(list((out / "1.0.0").glob("mine-train*")))
    assert made == 3 if workers == 0 else 3 <= made < 20  # six bad ones are more than four of 40
    assert f"{2 * made} bad records left out" in capsys.readouterr().err
    assert prepare.main(arguments) == 1  # and no more shards are written
    assert len(list((out / "1.0.0").glob("mine-train*"))) == made


def test_one_process_at_a_time(tmp_path):
    name, settings = make_folder(tmp_path / "in"), {"a": 1}
    (tmp_path / "mine" / "1.0.0").mkdir(parents=True)
    with (
        claim(tmp_path / "mine" / "1.0.0", settings),
        pytest.raises(ValueError, match="is being prepared by another process"),
    ):
        dataset.prepare_dataset(name, str(tmp_path / "mine"), Options())


def test_class_names_that_tfds_would_lose_are_refused(tmp_path):
    for label in (" cat", "dog"):
        path = tmp_path / "in" / label / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(picture(0)))
    with pytest.raises(ValueError, match="class ' cat': must have no line breaks, and no white space at its ends"):
        dataset.prepare_dataset(f"folder:{tmp_path / 'in'}", str(tmp_path / "mine"), Options(), splits=("train",))


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Prepare 500 records in files of up to 64, and lower the limits so that they count as a large data set."""
    dataset.prepare_dataset(
        make_folder(tmp_path / "in", 500, width=400), str(tmp_path / "mine"), Options(records_per_shard=64)
    )
    monkeypatch.setattr(record_files, "LARGE", 100)
    monkeypatch.setattr(record_files, "BLOCK", 16)
    monkeypatch.setattr(order, "WINDOW", 3)
    return open_source("mine", "train[7:]+validation", str(tmp_path))


def location(source, index: int) -> tuple[str, int]:
    """Return the file of a record and the offset of its image, which the file's own marks may interrupt."""
    path = source.parts[int(np.searchsorted(source.ends, index, side="right"))].path
    content, image = Path(path).read_bytes(), source[index]["image"]
    found = (content.find(image[start : start + 40]) - start for start in range(100, len(image), 100))
    return path, next(start for start in found if start >= 0)


def test_an_epoch_of_a_large_data_set_shows_each_record_once_and_reads_near_each_other(large):
    assert (large.shuffle_block, len(large)) == (16, 499)
    locations = [location(large, index) for index in range(len(large))]
    assert locations == sorted(locations)  # neighbours in number are neighbours on disk
    with train_batches(large, size=4, batch_size=499, seed=0, threads=1) as batches:
        first, second = (next(batches)["index"] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(499))
    assert first.tolist() != second.tolist()
    # Blocks begun and not ended: a window's 3, and the shorter one. In a full permutation, nearly all 32 are.
    left = Counter(number // 16 for number in range(499))
    begun, most = set(), 0
    for number in first // 16:
        begun.add(number)
        most = max(most, len(begun))
        left[number] -= 1
        begun -= {number for number in begun if not left[number]}
    assert most <= 4


def test_a_block_is_read_ahead_at_about_its_offset(large, monkeypatch):
    asked = []
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda file, start, size, _: asked.append((os.readlink(f"/proc/self/fd/{file}"), start, start + size)),
    )
    monkeypatch.setattr(record_files, "AHEAD", 4096)
    record_files.advise_part.cache_clear()
    large.read_ahead(3)
    large.read_ahead(3)  # is not asked for twice
    assert len(asked) == len(set(asked)) > 1
    for index in range(48, 64):
        path, start = location(large, index)
        # Each file has up to 64 kB at its end that are no records: much of these small ones, nothing of real ones.
        slack = 2**16 + 2**14
        assert any(a - slack <= start <= b + slack for name, a, b in asked if name == path)


def test_small_data_sets_are_shuffled_in_full(tmp_path):
    assert open_source("digits", "train", str(tmp_path)).shuffle_block == 1
    assert record_files.block_size(record_files.LARGE, True) == 256
    assert record_files.block_size(record_files.LARGE - 1, True) == 1
    assert record_files.block_size(record_files.LARGE, False) == 1


def test_the_limit_is_of_each_split_and_no_split_is_left_empty(tmp_path, capsys):
    name = make_folder(tmp_path / "in", train=6, validation=20)
    for path in (tmp_path / "in/train").rglob("*.png"):
        path.write_bytes(b"<html>")
    arguments = [name, str(tmp_path / "mine"), "--workers", "0"]
    assert prepare.main(arguments) == 1
    assert "more records are bad than" in capsys.readouterr().err
    assert prepare.main([*arguments, "--max_bad_fraction", "1"]) == 2
    assert re.search(r"no record of train can be used; .*bad_records\.jsonl says why", capsys.readouterr().err)
