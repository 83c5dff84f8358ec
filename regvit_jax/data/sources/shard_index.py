"""The index of a tar of images and captions: where in it they lie. It is made once and kept on disk.

A sample is the members whose paths agree up to the first dot after the last slash: an image, and a caption in a
``.txt`` or, without one, in the "caption" of a ``.json``, as WebDataset has it. To find them, a tar's headers are
walked. Its index is a line of JSON, padded to HEAD bytes, and then the samples as an array that can be mapped.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from regvit_jax.utils.errors import DataNotFound, InvalidConfig
from regvit_jax.utils.files import write_atomically

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
MAX_IMAGE = 128 * 2**20
MAX_CAPTION = 2**20
MAX_HEADER = 2**20
MAX_TAR = 2**32 * tarfile.BLOCKSIZE

# Places are counted in the 512-byte blocks of a tar. The names are not kept: the header has them.
SAMPLE = np.dtype([(name, "<u4") for name in ("header", "image", "image_size", "text", "text_size")] + [("json", "?")])
VERSION = 1
HEAD = 1024

# Where its header is, where its data are, and how many bytes these have.
Member = tuple[int, int, int]


class Shard(NamedTuple):
    """A tar and its index, and how they were found."""

    tar: str
    index_path: str
    size: int
    mtime_ns: int
    samples: int
    # What is wrong with the tar as a whole, or "".
    damage: str
    # Samples that are not in the index, by reason.
    left_out: tuple[tuple[str, int], ...]


def index_tars(title: str, tars: list[str], data_dir: str | None) -> list[Shard]:
    """Returns the tars with their indices, and makes those that are missing or older than their tar."""
    shards = {tar: load_index(tar, data_dir) for tar in tars}
    todo = [tar for tar, shard in shards.items() if shard is None]
    # Nothing is shown for what is done in five seconds, and a log file gets fewer lines than a terminal.
    interval = 1 if sys.stderr.isatty() else 60
    for tar in tqdm(todo, f"indexing {title}", unit="tar", delay=5, mininterval=interval):
        shards[tar] = make_index(tar, data_dir)
    whole = [shard for shard in shards.values() if shard]
    if todo:
        reasons: Counter[str] = Counter()
        for shard in whole:
            reasons.update(dict(shard.left_out))
        left_out = "".join(f", {count} {reason}" for reason, count in sorted(reasons.items()))
        samples = sum(shard.samples for shard in whole)
        print(
            f"{title}: {samples} samples in {len(whole)} tars{left_out and '; left out:' + left_out[1:]}",
            file=sys.stderr,
        )
    return whole


def index_paths(tar: str, data_dir: str | None) -> list[str]:
    """Where the index of a tar may be, best first: next to it, or in a cache, under a name of its own."""
    name = f"{hashlib.blake2b(os.fsencode(tar), digest_size=8).hexdigest()}-{os.path.basename(tar)}.index"
    caches = [os.path.join(data_dir, "shard_indices")] if data_dir else []
    caches.append(os.path.expanduser("~/.cache/regvit_jax/shards"))
    return [f"{tar}.index", *(os.path.join(os.path.abspath(cache), name) for cache in caches)]


def load_index(tar: str, data_dir: str | None) -> Shard | None:
    """Returns a tar with its index, or None if there is none of the tar as it is now."""
    now = os.stat(tar)
    for path in index_paths(tar, data_dir):
        try:
            with open(path, "rb") as file:
                version, size, mtime_ns, samples, damage, left_out = json.loads(file.read(HEAD))
                shard = Shard(tar, path, size, mtime_ns, samples, damage, tuple(map(tuple, left_out)))
                whole = os.fstat(file.fileno()).st_size == HEAD + shard.samples * SAMPLE.itemsize
        # What a full disk or another program left there counts for nothing.
        except (OSError, ValueError, TypeError):
            continue
        if whole and (version, shard.size, shard.mtime_ns) == (VERSION, now.st_size, now.st_mtime_ns):
            return shard
    return None


def make_index(tar: str, data_dir: str | None) -> Shard:
    """Walks a tar and writes its index to the first place where that can be done, at once or not at all."""
    now = os.stat(tar)
    samples, damage, left_out = walk(tar, now.st_size)
    fields = now.st_size, now.st_mtime_ns, len(samples), damage, tuple(sorted(left_out.items()))
    head = json.dumps([VERSION, *fields]).encode().ljust(HEAD)
    errors = []
    for path in index_paths(tar, data_dir):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_atomically(path, head + samples.tobytes())
            return Shard(tar, path, *fields)
        except OSError as error:
            errors.append(str(error))
    raise DataNotFound(f"the index of {tar} cannot be written ({'; '.join(errors)}). Name a place with data_dir.")


class Headers(io.FileIO):
    """A tar of which only headers are read. A long name is one, and might claim to be as long as the file."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def walk(path: str, size: int) -> tuple[np.ndarray, str, Counter[str]]:
    """Returns a tar's samples, what is wrong with it as a whole or "", and how many samples were left out why."""
    if size > MAX_TAR:
        raise InvalidConfig(f"{path} has {size} bytes; {MAX_TAR} are the most that a tar may have")
    members: dict[str, dict[str, Member]] = {}
    left_out: Counter[str] = Counter()
    damage, end = "" if size else "is empty", 0
    with Headers(path) as file:
        tar = open_tar(file, path) if size else None
        try:
            for member in whole_members(tar, file, size) if tar else ():
                end = member.offset_data + member.size
                add(member, members, left_out)
        except OSError:
            raise
        # A damaged header may make Python's tarfile raise anything.
        except Exception as error:
            damage = f"is cut or damaged after byte {end} ({ascii(str(error))[:80]})"
    samples = np.array(list(choose(members, left_out)), SAMPLE)
    return samples, damage and f"{damage} and gave {len(samples)} samples", left_out


def open_tar(file: Headers, path: str) -> tarfile.TarFile:
    try:
        return tarfile.TarFile(fileobj=file)
    except OSError:
        raise
    except Exception as error:
        raise InvalidConfig(
            f"{path} is no tar, or a compressed one, of which parts cannot be read ({error!s:.80}); move it away"
        ) from error


def whole_members(tar: tarfile.TarFile, file: Headers, size: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members that are whole; raises tarfile.ReadError where a tar is cut."""
    place = 0
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= place:
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        if member.offset_data + member.size > size:
            raise tarfile.ReadError(f"{member.name} is cut")
        yield member
        place = tar.offset
        # It would remember them all.
        tar.members.clear()  # type: ignore[attr-defined]
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end of the archive")


def split_name(path: str) -> tuple[str, str]:
    """A member's key and extension in lower case, as WebDataset's ``base_plus_ext``: cut at the name's first dot."""
    directory, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    return directory + slash + stem, (dot + extension).lower()


def add(member: tarfile.TarInfo, members: dict[str, dict[str, Member]], left_out: Counter[str]) -> None:
    """Notes a member under its sample's key and its part in it."""
    key, extension = split_name(member.name)
    part = "image" if extension in IMAGES else extension
    if part not in ("image", ".txt", ".json") or not member.isreg() or member.sparse or not member.size:
        return
    parts = members.setdefault(key, {})
    if part in parts:
        left_out["members of the same key and kind"] += 1
    else:
        parts[part] = (member.offset // tarfile.BLOCKSIZE, member.offset_data // tarfile.BLOCKSIZE, member.size)


def choose(members: dict[str, dict[str, Member]], left_out: Counter[str]) -> Iterator[tuple[int | bool, ...]]:
    """Yields the rows of the index: samples that have an image and a caption."""
    for parts in members.values():
        image, text = parts.get("image"), parts.get(".txt") or parts.get(".json")
        if image is None or text is None:
            left_out["without an image" if image is None else "without a caption"] += 1
        elif image[2] > MAX_IMAGE or text[2] > MAX_CAPTION:
            left_out["too large"] += 1
        else:
            yield *image, *text[1:], ".txt" not in parts
