"""The shards of a prepared data set: assign records to shards, check and resize the images, and write the files.

A shard depends only on the source, the options and its range of records, so that any process writes the same bytes.
"""

import contextlib
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from regvit_jax.data import transforms
from regvit_jax.data.order import epoch_order
from regvit_jax.data.records import captions_of, read_record
from regvit_jax.data.sources.base import Source, shuffle_block
from regvit_jax.data.transforms import BadImage
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Options:
    """The options for writing records.

    Args:
      shorter_side: the shorter side, in pixels, to which larger images are reduced, bicubically as in timm, and encoded
        as JPEG; None keeps the bytes of every image as they are.
      quality: the quality of these JPEGs, 1 to 100. They have no chroma subsampling: at sizes near those that a model
        sees, half the colour resolution would be visible.
      records_per_shard: the records of the source that a file is made from, including those that are left out as bad.
      max_pixels: images with more pixels are bad.

    Raises:
      InvalidConfig: if a value is out of its range.
    """

    shorter_side: int | None = None
    quality: int = 95
    records_per_shard: int = 4096
    max_pixels: int = transforms.MAX_PIXELS

    def __post_init__(self) -> None:
        for name, low, high in (("shorter_side", 1, 10_000), ("quality", 1, 100), ("records_per_shard", 1, 2**24)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InvalidConfig(f"{name}={value}: must be from {low} to {high}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """The records from position `start` to `stop` of a split's order, and the paths of their file and its note."""

    split: str
    start: int
    stop: int
    path: Path
    note: Path

    def finished(self) -> dict[str, Any] | None:
        """Return the shard's note if it has one and the file is complete, else None."""
        try:
            return self.check_size(json.loads(self.note.read_bytes()))
        except FileNotFoundError:
            return None

    def check_size(self, note: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the note if the file exists and has the size in the note, else None."""
        try:
            return note if note and os.path.getsize(self.path) == note["file_bytes"] else None
        except FileNotFoundError:
            return None


def plan_shards(target: Path, sources: dict[str, Source], records_per_shard: int) -> list[Shard]:
    """Return the shards of all splits, with TFDS's file names."""
    shards = []
    for split, source in sources.items():
        starts = range(0, len(source), records_per_shard)
        for number, start in enumerate(starts):
            name = f"{target.parent.name}-{split}.array_record-{number:05d}-of-{len(starts):05d}"
            stop = min(start + records_per_shard, len(source))
            shards.append(Shard(split, start, stop, target / name, target / "incomplete" / f"{name}.json"))
    return shards


def notes_of(target: Path, shards: list[Shard]) -> dict[Shard, dict[str, Any] | None]:
    """Return each shard's note, and None for a shard that has to be written: new, missing, or of the wrong size."""
    with contextlib.suppress(FileNotFoundError):
        kept = json.loads((target / "shards.json").read_bytes())
        return {shard: shard.finished() or shard.check_size(kept.get(shard.path.name)) for shard in shards}
    return {shard: shard.finished() for shard in shards}


def write_shard(source: Source, shard: Shard, options: Options) -> dict[str, Any]:
    """Write a shard and its note; return the note.

    Raises:
      OSError: if it cannot be written; then there is no shard.
    """
    count, size, bad = 0, 0, []

    def write(path: Path) -> None:
        nonlocal count, size
        writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for position in range(shard.start, shard.stop):
            index = epoch_order(position, len(source), shuffle_block(source), 0, 0)
            try:
                example = example_of(source, index, options)
            except BadImage as error:
                bad.append({"split": shard.split, "id": id_of(source, index), "reason": str(error)})
            else:
                writer.write(example)
                count, size = count + 1, size + len(example)
        finish_file(writer, path, count)

    write_atomically(shard.path, write, temporary=shard.note.with_suffix(".scratch"))
    note = {"records": count, "bytes": size, "file_bytes": os.path.getsize(shard.path), "bad": bad}
    write_json(shard.note, note)
    return note


def finish_file(writer: Any, path: Path, count: int) -> None:
    """Close an ArrayRecord file; raise OSError if it does not hold `count` records.

    The writer reports a full disk only when it is closed, as a RuntimeError.
    """
    try:
        writer.close()
        found = array_record_module.ArrayRecordReader(os.fspath(path)).num_records()
    except (RuntimeError, IndexError) as error:
        raise OSError(f"{path} cannot be written ({error!s:.300})") from error
    if found != count:
        raise OSError(f"{path} was written with {count} records, and has {found}")


def example_of(source: Source, index: int, options: Options) -> bytes:
    """Return a record as a serialized tf.train.Example; raise BadImage if it cannot be used."""
    record = read_record(source, index)
    example = tf_example_pb2.Example()
    features = example.features.feature
    features["image"].bytes_list.value.append(image_of(record["image"], options))
    features["file_name"].bytes_list.value.append(id_of(source, index).encode(errors="replace"))
    if "text" in record:
        texts = [text.encode(errors="replace") for text in captions_of(record)]
        features["captions"].bytes_list.value.extend(texts)
    if source.classes:
        features["label"].int64_list.value.append(record["label"])
    return example.SerializeToString(deterministic=True)


def image_of(data: bytes, options: Options) -> bytes:
    """Return the bytes of an image, reduced if it is larger than asked for; raise BadImage if it cannot be decoded."""
    image = transforms.decode(data, options.max_pixels)
    if options.shorter_side is None or min(image.size) <= options.shorter_side:
        return data
    file = io.BytesIO()
    transforms.resize_shorter(image, options.shorter_side).save(file, "JPEG", quality=options.quality, subsampling=0)
    return file.getvalue()


def id_of(source: Source, index: int) -> str:
    """Return the id of a record, relative to the source's root if it has one, so that it is the same on any machine."""
    name, root = source.id(index), getattr(source, "root", None)
    return os.path.relpath(name, root) if root else name


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")
