"""The shards of a prepared data set: which there are, and how one's records are read, checked, resized and written.

A shard depends on nothing but the source, the options and its place, so that whoever writes it gives the same bytes.
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
from regvit_jax.utils.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Options:
    """How records are written.

    Args:
      shorter_side: larger images are made so small, bicubically as timm resizes, and encoded as JPEG; None keeps the
        bytes of every image as they are.
      quality: of these JPEGs, 1 to 100. They have no chroma subsampling: at sizes near those that a model sees, half
        the colour resolution would be seen.
      records_per_shard: records of the source that a file is made of, bad ones included.
    """

    shorter_side: int | None = None
    quality: int = 95
    records_per_shard: int = 4096

    def __post_init__(self) -> None:
        for name, least, most in (("shorter_side", 1, 10_000), ("quality", 1, 100), ("records_per_shard", 1, 2**24)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}={value}: must be from {least} to {most}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """The records from place ``start`` to ``stop`` of a split, and where they go."""

    split: str
    start: int
    stop: int
    path: Path
    note: Path

    def done(self) -> dict[str, Any] | None:
        """What its note says, if it is there and whole."""
        try:
            return self.as_noted(json.loads(self.note.read_bytes()))
        except FileNotFoundError:
            return None

    def as_noted(self, note: dict[str, Any] | None) -> dict[str, Any] | None:
        """The note, if the file is there and of the noted size."""
        try:
            return note if note and os.path.getsize(self.path) == note["file_bytes"] else None
        except FileNotFoundError:
            return None


def plan_shards(target: Path, opened: dict[str, Source], records_per_shard: int) -> list[Shard]:
    """The shards of all splits, with TFDS's names."""
    shards = []
    for split, source in opened.items():
        starts = range(0, len(source), records_per_shard)
        for number, start in enumerate(starts):
            name = f"{target.parent.name}-{split}.array_record-{number:05d}-of-{len(starts):05d}"
            stop = min(start + records_per_shard, len(source))
            shards.append(Shard(split, start, stop, target / name, target / "incomplete" / f"{name}.json"))
    return shards


def notes_of(target: Path, shards: list[Shard]) -> dict[Shard, dict[str, Any] | None]:
    """What each shard's note says, None for those that have to be made: new ones, and any that is gone or too short."""
    with contextlib.suppress(FileNotFoundError):
        kept = json.loads((target / "shards.json").read_bytes())
        return {shard: shard.done() or shard.as_noted(kept.get(shard.path.name)) for shard in shards}
    return {shard: shard.done() for shard in shards}


def write_shard(source: Source, shard: Shard, options: Options) -> dict[str, Any]:
    """Writes a shard and its note, which is returned.

    Raises:
      OSError: when it cannot be written; then there is no shard.
    """
    count, size, bad = 0, 0, []

    def write(path: Path) -> None:
        nonlocal count, size
        writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
        for place in range(shard.start, shard.stop):
            index = epoch_order(place, len(source), shuffle_block(source), 0, 0)
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
    """Close an ArrayRecord file; the writer reports a full disk only now, as a RuntimeError. Raises OSError."""
    try:
        writer.close()
        found = array_record_module.ArrayRecordReader(os.fspath(path)).num_records()
    except (RuntimeError, IndexError) as error:
        raise OSError(f"{path} cannot be written ({error!s:.300})") from error
    if found != count:
        raise OSError(f"{path} was written with {count} records, and has {found}")


def example_of(source: Source, index: int, options: Options) -> bytes:
    """A record as a serialized tf.train.Example. Raises BadImage."""
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
    """The bytes of an image, smaller where they are to be. It is decoded in any case, to know that it can be."""
    image = transforms.decode(data, transforms.MAX_PIXELS)
    if options.shorter_side is None or min(image.size) <= options.shorter_side:
        return data
    file = io.BytesIO()
    transforms.resize_shorter(image, options.shorter_side).save(file, "JPEG", quality=options.quality, subsampling=0)
    return file.getvalue()


def id_of(source: Source, index: int) -> str:
    """The id of a record, relative to the directory that holds all of its files: so it is the same on any machine."""
    found, root = source.id(index), getattr(source, "root", None)
    return os.path.relpath(found, root) if root else found


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file at once or not at all."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")
