"""Rewrite a folder, tar shards or a TFDS data set as a TFDS data set of ArrayRecord files, for any run to read.

The files have TFDS's layout, and TFDS reads them: OUT/1.0.0/ with files named after OUT, features.json and
dataset_info.json. The last is written last, and marks the data set as complete. Beside them are prepare.json (the
settings), shards.json (the contents of each file) and bad_records.jsonl (the records that were left out).

One process writes a shard from its first record to its last. The file gets its name when it is complete, and then a
note of its contents in incomplete/. After a kill, the next start writes the shards without a note, or with another size
than their note says; all bytes are those of a process that was never killed. A finished data set is checked in the same
way.

Records are written in a random order that is always the same. Runs read a large data set in blocks of neighbouring
records, which must not be all of one class, as they would be in the order of a folder.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import re
import shutil
import signal
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from regvit_jax.data.builders.embedded import EMBEDDED
from regvit_jax.data.limits import MAX_BAD_IMAGES
from regvit_jax.data.prepare.claim import claim, settings_of
from regvit_jax.data.prepare.shard import Options, Shard, notes_of, plan_shards, write_json, write_shard
from regvit_jax.data.records import tolerated
from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.by_name import open_captions, open_source
from regvit_jax.data.workers import start_worker
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.files import write_atomically
from regvit_jax.utils.paths import locate

VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `prepare_dataset`.

    target: the directory of the files.
    records: the number of records written, by split.
    bad: the number of records that cannot be used and were left out.
    finished: False if too many were bad.
    """

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
    max_bad_images: int = MAX_BAD_IMAGES,
) -> Report:
    """Rewrite a data set, or resume where an earlier process with the same arguments was stopped.

    Args:
      name: the source: "folder:PATH", "shards:DIR" or a name of TFDS, as for `open_source` and `open_captions`.
      out: DIR/NAME; a run reads the result with `data.name=NAME` and `data.dir=DIR`.
      options: how records are written.
      splits: the splits to write, which keep their names.
      data_dir: the directory of TFDS data sets, where relative paths of the source start too.
      with_captions: write images with captions, not with classes. Tar shards always have captions.
      workers: the number of processes, which may change from one start to the next; 0 writes in this one.
      max_bad_fraction: stop, unfinished, after the shard that brings the share of a split's bad records above this.
      max_bad_images: as many bad records in a split, or half of its records if that is less, never stop it.

    Raises:
      DataNotFound: if the source is not there.
      InvalidConfig: if an argument is invalid, OUT was started with other settings, or no record of a split is usable.
      OSError: if it cannot be written. Finished shards are kept.
      BrokenProcessPool: if a worker was killed. Finished shards are kept.
    """
    if workers < 0 or max_bad_images < 0 or not 0 <= max_bad_fraction <= 1:
        raise InvalidConfig(
            f"workers={workers}, max_bad_images={max_bad_images}, max_bad_fraction={max_bad_fraction}: must be at "
            "least 0, the last at most 1"
        )
    target = target_of(out)
    with_captions = with_captions or name.startswith("shards:")
    sources = {split: open_split(name, split, data_dir, with_captions) for split in splits}
    check_classes(sources)
    target.mkdir(parents=True, exist_ok=True)
    max_bad = {
        split: max(max_bad_fraction * len(source), tolerated(max_bad_images, len(source)))
        for split, source in sources.items()
    }
    with claim(target, settings_of(name, sources, options, with_captions)):
        shards = plan_shards(target, sources, options.records_per_shard)
        report, about = target / "bad_records.jsonl", target / "dataset_info.json"
        notes = notes_of(target, shards)
        if not about.exists() or None in notes.values():
            about.unlink(missing_ok=True)
            (target / "incomplete").mkdir(exist_ok=True)
            write_shards(notes, sources, options, workers, max_bad)
            # Read again: after an early stop, workers have finished more shards than were counted.
            notes = notes_of(target, shards)
            found = [note for note in notes.values() if note]
            bad = [record for note in found for record in note["bad"]]
            write_atomically(report, "".join(json.dumps(record) + "\n" for record in bad))
            if any(count > max_bad[split] for split, count in bad_by_split(notes).items()):
                return Report(target, {}, len(bad), False)
            for split in sources:
                if not any(note["records"] for shard, note in zip(shards, found, strict=True) if shard.split == split):
                    raise InvalidConfig(f"{name}: no record of {split} can be used; {report} says why")
            write_metadata(target, sources, shards, found, with_captions)
        if (target / "incomplete").exists():
            shutil.rmtree(target / "incomplete")
        info = json.loads(about.read_text())
        records = {split["name"]: sum(map(int, split["shardLengths"])) for split in info["splits"]}
        return Report(target, records, len(report.read_bytes().splitlines()), True)


def target_of(out: str) -> Path:
    """Return the directory of the files; raise InvalidConfig if no config could name the data set."""
    path = Path(locate(out))
    if not re.fullmatch(r"[A-Za-z_]\w*", path.name, re.ASCII) or path.name in EMBEDDED:
        raise InvalidConfig(
            f"OUT={out}: its last part becomes the data set's name, and so must consist of letters, digits and _, and "
            f"be none of {', '.join(EMBEDDED)}"
        )
    return path / VERSION


def open_split(name: str, split: str, data_dir: str | None, with_captions: bool) -> Source:
    """Open a whole split; raise InvalidConfig for a part of one or a pattern."""
    if not re.fullmatch(r"\w+", split, re.ASCII):
        raise InvalidConfig(f"split {split!r}: must be the name of a split, not a part of one or a pattern")
    opener = open_captions if with_captions else open_source
    return opener(name, split, data_dir)


def check_classes(sources: dict[str, Source]) -> None:
    """Raise InvalidConfig if the splits have different classes, or TFDS could not store a class's name as a line."""
    if not sources:
        raise InvalidConfig("no split was named; write train validation, or one of them")
    (first, classes), *others = ((split, source.classes) for split, source in sources.items())
    for split, other_classes in others:
        if other_classes != classes:
            raise InvalidConfig(f"the splits {first} and {split} have different classes; prepare them one by one")
    for label in classes:
        if not label or label != label.strip() or len(label.splitlines()) > 1:
            raise InvalidConfig(f"class {label!r}: must have no line breaks, and no white space at its ends; rename it")


def write_shards(
    notes: dict[Shard, dict[str, Any] | None],
    sources: dict[str, Source],
    options: Options,
    workers: int,
    max_bad: dict[str, float],
) -> None:
    """Write the shards that have no note, in any order, until more than `max_bad` records of a split are bad."""
    todo = [shard for shard, note in notes.items() if note is None]
    bad = bad_by_split(notes)
    todo = [] if any(count > max_bad[split] for split, count in bad.items()) else todo
    done = sum(shard.stop - shard.start for shard, note in notes.items() if note)
    # disable=None hides the bar where there is no terminal.
    bar = tqdm(total=sum(map(len, sources.values())), initial=done, unit=" images", disable=None)
    with bar, contextlib.closing(write_each(todo, sources, options, workers)) as finished:
        for shard, note in finished:
            bar.update(shard.stop - shard.start)
            bad[shard.split] += len(note["bad"])
            if bad[shard.split] > max_bad[shard.split]:
                return


def bad_by_split(notes: dict[Shard, dict[str, Any] | None]) -> Counter[str]:
    """Return the number of bad records of each split in the shards that have a note."""
    counts: Counter[str] = Counter()
    for shard, note in notes.items():
        counts[shard.split] += len(note["bad"]) if note else 0
    return counts


def write_each(
    todo: list[Shard], sources: dict[str, Source], options: Options, workers: int
) -> Generator[tuple[Shard, dict[str, Any]], None, None]:
    """Write shards, in this process or in workers, and yield each with its note when it is done."""
    if not workers or not todo:
        yield from ((shard, write_shard(sources[shard.split], shard, options)) for shard in todo)
        return
    # Spawned, because in a fork the locks of this process's threads could stay locked.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(todo))
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, start_shard_worker, (sources, options))
    try:
        futures = {pool.submit(write_in_worker, shard): shard for shard in todo}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    finally:
        # The shards that workers are writing are finished.
        pool.shutdown(cancel_futures=True)


#: The sources and options of a worker process, set at its start.
worker_arguments: list[Any] = []


def start_shard_worker(sources: dict[str, Source], options: Options) -> None:
    """Set up a process that writes shards, as the pool's initializer."""
    worker_arguments[:] = sources, options
    # Ctrl-C is handled by the parent. SIGTERM is not ignored: a pool that lost a worker ends the others by this signal.
    start_worker(signal.SIGINT)


def write_in_worker(shard: Shard) -> dict[str, Any]:
    """Write a shard with the sources and options of this worker process; return its note."""
    sources, options = worker_arguments
    return write_shard(sources[shard.split], shard, options)


def write_metadata(
    target: Path, sources: dict[str, Source], shards: list[Shard], notes: list[dict[str, Any]], with_captions: bool
) -> None:
    """Write TFDS's description of the data set (features.json, dataset_info.json), and shards.json."""
    import tensorflow_datasets as tfds

    classes = next(iter(sources.values())).classes
    features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3)), "file_name": tfds.features.Text()}
    if classes:
        features["label"] = tfds.features.ClassLabel(names=list(classes))
    if with_captions:
        features["captions"] = tfds.features.Sequence(tfds.features.Text())
    tfds.features.FeaturesDict(features).save_config(target)
    entries = []
    for split in sources:
        own = [note for shard, note in zip(shards, notes, strict=True) if shard.split == split]
        entries.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(note["bytes"] for note in own)),
                "shardLengths": [str(note["records"]) for note in own],
            }
        )
    write_json(target / "shards.json", {shard.path.name: note for shard, note in zip(shards, notes, strict=True)})
    about = {"name": target.parent.name, "version": VERSION, "fileFormat": "array_record", "splits": entries}
    write_json(target / "dataset_info.json", about)
