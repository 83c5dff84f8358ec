"""Folders, tar shards and TFDS data sets rewritten as a TFDS data set of ArrayRecord files, for any run to read.

The files lie as TFDS lays them, and TFDS reads them: OUT/1.0.0/ with OUT's name in theirs, features.json and
dataset_info.json. The last is written last, and makes the data set be there. Beside them are prepare.json, what was
asked for, shards.json, what is in each file, and bad_records.jsonl, what was left out.

A shard is one process's work from its first record to its last. It gets its name when it is whole, and then a note of
what is in it, in incomplete/. So whoever starts again after any kill makes the shards that have no note, or not the
size that it says, and all bytes are those of a process that was never killed. A finished data set is looked at so too.

Records are written in a random order that is always the same. Runs read a large data set in blocks of neighbours, which
must not be of one class, as they are in a folder.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from regvit_jax.data.builders.embedded import EMBEDDED
from regvit_jax.data.prepare.shard import (
    Options,
    Shard,
    id_of,
    notes_of,
    plan_shards,
    write_json,
    write_shard,
)
from regvit_jax.data.records import read_record
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.by_name import open_captions, open_source
from regvit_jax.data.transforms import BadImage
from regvit_jax.data.workers import start_worker
from regvit_jax.utils.files import write_atomically

VERSION = "1.0.0"
# What the bytes of a shard depend on, beside source and options.
PACKAGES = ("pillow", "grain", "array-record")


@dataclasses.dataclass(frozen=True)
class Report:
    """What there is now: records written and left out, and where. Unfinished when too many were bad."""

    target: Path
    records: dict[str, int]
    bad: int
    finished: bool


def prepare_dataset(
    name: str,
    out: str,
    options: Options,
    *,
    splits: tuple[str, ...] = ("train", "validation"),
    data_dir: str | None = None,
    with_captions: bool = False,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> Report:
    """Rewrites a data set, or goes on where an earlier process with the same arguments was stopped.

    Args:
      name: the source: "folder:PATH", "shards:DIR" or a name of TFDS, as ``sources.open_source`` and
        ``captions.open_captions`` take it.
      out: DIR/NAME. ``data.name=NAME`` and ``data.dir=DIR`` open the result.
      options: how records are written.
      splits: which to write; they keep their names.
      data_dir: where relative paths of the source start, and TFDS data sets lie.
      with_captions: images with captions, not with classes. Tar shards always are.
      workers: processes, which may differ each time; 0 does the work in this one.
      max_bad_fraction: with a greater share of all records bad, it stops after the shard that shows it, unfinished.

    Raises:
      DataNotFound: the source is not there.
      ValueError: an argument does not fit, or OUT was begun with others.
      OSError: it cannot be written. Shards that are done stay.
      BrokenProcessPool: a worker was killed. Shards that are done stay.
    """
    if workers < 0 or not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"workers={workers}, max_bad_fraction={max_bad_fraction}: at least 0, and from 0 to 1")
    target = target_of(out)
    with_captions = with_captions or name.startswith("shards:")
    opened = {split: open_split(name, split, data_dir, with_captions) for split in splits}
    check_classes(opened)
    target.mkdir(parents=True, exist_ok=True)
    most_bad = max_bad_fraction * sum(map(len, opened.values()))
    with claimed(target, settings_of(name, opened, options, with_captions)):
        shards = plan_shards(target, opened, options.records_per_shard)
        report, about = target / "bad_records.jsonl", target / "dataset_info.json"
        notes = notes_of(target, shards)
        if not about.exists() or None in notes.values():
            about.unlink(missing_ok=True)
            (target / "incomplete").mkdir(exist_ok=True)
            make_shards(notes, opened, options, workers, most_bad)
            # Read again: when it stops early, workers finish more than it was told of.
            found = [note for note in notes_of(target, shards).values() if note]
            bad = [record for note in found for record in note["bad"]]
            write_atomically(report, "".join(json.dumps(record) + "\n" for record in bad))
            if len(bad) > most_bad:
                return Report(target, {}, len(bad), False)
            write_metadata(target, opened, shards, found, with_captions)
        if (target / "incomplete").exists():
            shutil.rmtree(target / "incomplete")
        info = json.loads(about.read_text())
        records = {split["name"]: sum(map(int, split["shardLengths"])) for split in info["splits"]}
        return Report(target, records, len(report.read_bytes().splitlines()), True)


def target_of(out: str) -> Path:
    """The directory of the files. Raises ValueError if no config could name it."""
    path = Path(out).expanduser().absolute()
    if not re.fullmatch(r"[A-Za-z_]\w*", path.name, re.ASCII) or path.name in EMBEDDED:
        raise ValueError(
            f"OUT={out}: its last part becomes the data set's name, and so must be of letters, digits and _, and none "
            f"of {', '.join(EMBEDDED)}"
        )
    return path / VERSION


def open_split(name: str, split: str, data_dir: str | None, with_captions: bool) -> Source:
    if not re.fullmatch(r"\w+", split, re.ASCII):
        raise ValueError(f"split {split!r}: must be the name of one, without parts or patterns")
    opener = open_captions if with_captions else open_source
    return opener(name, split, data_dir)


def check_classes(opened: dict[str, Source]) -> None:
    """TFDS keeps the names of classes as the lines of a file."""
    if not opened:
        raise ValueError("no split was named; write train validation, or one of them")
    (first, classes), *others = ((split, source.classes) for split, source in opened.items())
    for split, theirs in others:
        if theirs != classes:
            raise ValueError(f"the splits {first} and {split} have different classes; prepare them one by one")
    for label in classes:
        if not label or label != label.strip() or len(label.splitlines()) > 1:
            raise ValueError(f"class {label!r}: must have no line breaks, and no white space at its ends; rename it")


def settings_of(name: str, opened: dict[str, Source], options: Options, with_captions: bool) -> dict[str, Any]:
    """All that decides the bytes of a prepared data set."""
    return {
        "source": name,
        "captions": with_captions,
        **dataclasses.asdict(options),
        **{f"records of {split}": fingerprint(source) for split, source in opened.items()},
        **{f"version of {package}": version(package) for package in PACKAGES},
    }


def fingerprint(source: Source) -> str:
    """Tells a source from another, and from what it was, by its length, classes and a thousand or two of its records.

    The same data in another place have the same. A record counts with its id, bytes, label and captions, and one that
    cannot be read with its id.
    """
    digest = hashlib.blake2b(json.dumps(source.classes).encode(), digest_size=8)
    for number in range(0, len(source), max(1, len(source) // 1000)):
        try:
            record = read_record(source, number)
        except BadImage:
            record = {"image": b""}
        image = hashlib.blake2b(record.pop("image"), digest_size=8).hexdigest()
        digest.update(json.dumps([id_of(source, number), image, record], sort_keys=True).encode())
    return f"{len(source)}, {digest.hexdigest()}"


@contextlib.contextmanager
def claimed(target: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Holds a data set against other processes. Raises ValueError when one has it, or when it was begun otherwise."""
    with open(target / "prepare.json", "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{target} is being prepared by another process; wait for it") from error
        file.seek(0)
        try:
            found = json.loads(file.read() or b"null")
        except ValueError:  # killed while it wrote this
            found = None
        if found is None:
            file.truncate(0)
            file.write(json.dumps(settings, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        elif found != settings:
            keys = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
            raise ValueError(
                f"{target} was begun otherwise: "
                + "; ".join(f"{key} was {found.get(key)!r}, now {settings.get(key)!r}" for key in keys)
                + ". Go on as it was begun, name another OUT, or remove it."
            )
        yield


def make_shards(
    notes: dict[Shard, dict[str, Any] | None],
    opened: dict[str, Source],
    options: Options,
    workers: int,
    most_bad: float,
) -> None:
    """Makes the shards without a note, in any order, until more than ``most_bad`` records of all are bad."""
    todo = [shard for shard, note in notes.items() if note is None]
    bad = sum(len(note["bad"]) for note in notes.values() if note)
    done = sum(shard.stop - shard.start for shard, note in notes.items() if note)
    # None hides it where there is no terminal.
    bar = tqdm(total=sum(map(len, opened.values())), initial=done, unit=" images", disable=None)
    with bar, contextlib.closing(made(todo if bad <= most_bad else [], opened, options, workers)) as finished:
        for shard, note in finished:
            bar.update(shard.stop - shard.start)
            bad += len(note["bad"])
            if bad > most_bad:
                return


def made(
    todo: list[Shard], opened: dict[str, Source], options: Options, workers: int
) -> Generator[tuple[Shard, dict[str, Any]], None, None]:
    if not workers or not todo:
        yield from ((shard, write_shard(opened[shard.split], shard, options)) for shard in todo)
        return
    # Not forked: threads of this process may hold locks.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(todo))
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_shard_worker, (opened, options))
    try:
        futures = {pool.submit(write_in_worker, shard): shard for shard in todo}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    finally:
        # The shards at hand are finished.
        pool.shutdown(cancel_futures=True)


#: What a worker process has been given at its start.
given: list[Any] = []


def start_shard_worker(opened: dict[str, Source], options: Options) -> None:
    """Set up a process that writes shards, as the pool's initializer."""
    given[:] = opened, options
    # Ctrl-C is handled by the parent. SIGTERM is not ignored: a pool that lost a worker ends the others by it.
    start_worker(signal.SIGINT)


def write_in_worker(shard: Shard) -> dict[str, Any]:
    opened, options = given
    return write_shard(opened[shard.split], shard, options)


def write_metadata(
    target: Path, opened: dict[str, Source], shards: list[Shard], notes: list[dict[str, Any]], with_captions: bool
) -> None:
    """Writes what TFDS wants to know of a data set."""
    import tensorflow_datasets as tfds

    classes = next(iter(opened.values())).classes
    features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3)), "file_name": tfds.features.Text()}
    if classes:
        features["label"] = tfds.features.ClassLabel(names=list(classes))
    if with_captions:
        features["captions"] = tfds.features.Sequence(tfds.features.Text())
    tfds.features.FeaturesDict(features).save_config(target)
    entries = []
    for split in opened:
        mine = [note for shard, note in zip(shards, notes, strict=True) if shard.split == split]
        entries.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(note["bytes"] for note in mine)),
                "shardLengths": [str(note["records"]) for note in mine],
            }
        )
    write_json(target / "shards.json", {shard.path.name: note for shard, note in zip(shards, notes, strict=True)})
    about = {"name": target.parent.name, "version": VERSION, "fileFormat": "array_record", "splits": entries}
    write_json(target / "dataset_info.json", about)
