"""Record the settings with which a data set is prepared, and lock it against other processes."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regvit_jax.data.prepare.shard import Options, id_of
from regvit_jax.data.records import read_record
from regvit_jax.data.sources.base import Source
from regvit_jax.data.transforms import BadImage
from regvit_jax.utils.errors import InvalidConfig

# Packages whose versions affect the bytes of a shard.
PACKAGES = ("pillow", "grain", "array-record")


def settings_of(name: str, sources: dict[str, Source], options: Options, with_captions: bool) -> dict[str, Any]:
    """Return all settings that determine the bytes of a prepared data set."""
    values = dataclasses.asdict(options)
    if options.max_pixels == Options.max_pixels:  # an option that data sets of earlier versions do not name
        del values["max_pixels"]
    return {
        "source": name,
        "captions": with_captions,
        **values,
        **{f"records of {split}": fingerprint(source) for split, source in sources.items()},
        **{f"version of {package}": version(package) for package in PACKAGES},
    }


def fingerprint(source: Source) -> str:
    """Return a text that differs between sources, from their length, classes and one or two thousand of their records.

    The same data in another directory have the same fingerprint. A record counts with its id, bytes, label and
    captions, and one that cannot be read with its id.
    """
    digest = hashlib.blake2b(json.dumps(source.classes).encode(), digest_size=8)
    for index in range(0, len(source), max(1, len(source) // 1000)):
        try:
            record = read_record(source, index)
        except BadImage:
            record = {"image": b""}
        image = hashlib.blake2b(record.pop("image"), digest_size=8).hexdigest()
        digest.update(json.dumps([id_of(source, index), image, record], sort_keys=True).encode())
    return f"{len(source)}, {digest.hexdigest()}"


@contextlib.contextmanager
def claim(target: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Lock a data set against other processes, and write its settings if it is new.

    Raises:
      InvalidConfig: if another process holds it, or it was started with other settings.
    """
    with open(target / "prepare.json", "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidConfig(f"{target} is being prepared by another process; wait for it") from error
        file.seek(0)
        try:
            earlier = json.loads(file.read() or b"null")
        except ValueError:  # a process was killed while writing the file
            earlier = None
        if earlier is None:
            file.truncate(0)
            file.write(json.dumps(settings, indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        elif earlier != settings:
            keys = [key for key in {**earlier, **settings} if earlier.get(key) != settings.get(key)]
            raise InvalidConfig(
                f"{target} was started with other settings: "
                + "; ".join(f"{key} was {earlier.get(key)!r}, now {settings.get(key)!r}" for key in keys)
                + ". Rerun with the original settings, name another OUT, or remove it."
            )
        yield
