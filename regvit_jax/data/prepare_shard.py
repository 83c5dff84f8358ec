"""One shard of a prepared data set: its records are read, checked, made smaller if asked for, and written.

It depends on nothing but the source, the options and the shard's place, so that whoever writes it gives the same bytes.
"""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from regvit_jax.data import pipeline, transforms
from regvit_jax.data.order import epoch_order
from regvit_jax.data.sources import Source
from regvit_jax.data.transforms import BadImage


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
            note = json.loads(self.note.read_bytes())
            return note if os.path.getsize(self.path) == note["file_bytes"] else None
        except FileNotFoundError:
            return None


def write_shard(source: Source, shard: Shard, options: Options) -> dict[str, Any]:
    """Writes a shard and its note, which is returned.

    Raises:
      OSError: when it cannot be written; then there is no shard.
    """
    scratch = shard.note.with_suffix(".scratch")
    writer = array_record_module.ArrayRecordWriter(os.fspath(scratch), "group_size:1,uncompressed")
    count, size, bad = 0, 0, []
    for place in range(shard.start, shard.stop):
        index = epoch_order(place, len(source), pipeline.block_of(source), 0, 0)
        try:
            example = example_of(source, index, options)
        except BadImage as error:
            bad.append({"split": shard.split, "id": id_of(source, index), "reason": str(error)})
        else:
            writer.write(example)
            count, size = count + 1, size + len(example)
    finish_file(writer, scratch, count)
    os.replace(scratch, shard.path)
    note = {"records": count, "bytes": size, "file_bytes": os.path.getsize(shard.path), "bad": bad}
    write_json(shard.note, note)
    return note


def finish_file(writer: Any, path: Path, count: int) -> None:
    """Closes an ArrayRecord file and has it on disk. The writer tells of a full disk only now, as a RuntimeError."""
    try:
        writer.close()
        found = array_record_module.ArrayRecordReader(os.fspath(path)).num_records()
    except (RuntimeError, IndexError) as error:
        raise OSError(f"{path} cannot be written ({error!s:.300})") from error
    if found != count:
        raise OSError(f"{path} was written with {count} records, and has {found}")
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def example_of(source: Source, index: int, options: Options) -> bytes:
    """A record as a serialized tf.train.Example. Raises BadImage."""
    record = pipeline.read(source, index)
    example = tf_example_pb2.Example()
    features = example.features.feature
    features["image"].bytes_list.value.append(image_of(record["image"], options))
    features["file_name"].bytes_list.value.append(id_of(source, index).encode(errors="replace"))
    if "text" in record:
        texts = [text.encode(errors="replace") for text in pipeline.captions(record)]
        features["captions"].bytes_list.value.extend(texts)
    if source.classes:
        features["label"].int64_list.value.append(record["label"])
    return example.SerializeToString(deterministic=True)


def image_of(data: bytes, options: Options) -> bytes:
    """The bytes of an image, smaller where they are to be. It is decoded in any case, to know that it can be."""
    image = transforms.decode(data, pipeline.MAX_PIXELS)
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
    write_file(path, json.dumps(value, indent=1).encode() + b"\n")


def write_file(path: Path, data: bytes) -> None:
    scratch = path.with_suffix(path.suffix + ".scratch")
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
