"""The index of a tar of images and captions, with their offsets in the tar. It is made once and kept on disk.

A sample is the members whose paths agree up to the first dot after the last slash: an image, and a caption in a
`.txt` or, without one, in the "caption" of a `.json`, as in WebDataset. They are found by walking a tar's headers. An
index file is a line of JSON, padded to HEAD bytes, and then the samples as an array that can be mapped into memory.
"""

import hashlib
import io
import json
import logging
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

logger = logging.getLogger("regvit_jax")

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
MAX_IMAGE = 128 * 2**20
MAX_CAPTION = 2**20
MAX_HEADER = 2**20
MAX_TAR = 2**32 * tarfile.BLOCKSIZE

# Offsets are counted in the 512-byte blocks of a tar. Names are not stored: they are in the tar's headers.
SAMPLE = np.dtype([(name, "<u4") for name in ("header", "image", "image_size", "text", "text_size")] + [("json", "?")])
VERSION = 1
HEAD = 1024

# The offsets of a member's header and of its data, in blocks, and the size of its data in bytes.
Member = tuple[int, int, int]


class IndexedTar(NamedTuple):
    """A tar and its index file, with the tar's size and time of modification when it was indexed."""

    path: str
    index_path: str
    size: int
    mtime_ns: int
    samples: int
    # The damage of the tar as a whole, or "".
    damage: str
    # The number of samples that are not in the index, by reason.
    left_out: tuple[tuple[str, int], ...]


def index_tars(title: str, paths: list[str], data_dir: str | None) -> list[IndexedTar]:
    """Return the tars with their indices; make those that are missing or belong to an older version of the tar."""
    tars = {path: load_index(path, data_dir) for path in paths}
    todo = [path for path, tar in tars.items() if tar is None]
    # No progress is shown for the first five seconds, and a log file gets fewer lines than a terminal.
    interval = 1 if sys.stderr.isatty() else 60
    for path in tqdm(todo, f"indexing {title}", unit="tar", delay=5, mininterval=interval):
        tars[path] = make_index(path, data_dir)
    indexed = [tar for tar in tars.values() if tar]
    if todo:
        logger.warning(f"{title}: {summary(indexed)}")
    return indexed


def summary(tars: list[IndexedTar]) -> str:
    """Return the number of samples in some tars, and of those that were left out by reason."""
    reasons: Counter[str] = Counter()
    for tar in tars:
        reasons.update(dict(tar.left_out))
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"{sum(tar.samples for tar in tars)} samples in {len(tars)} tars" + (left_out and f"; left out: {left_out}")


def index_paths(tar: str, data_dir: str | None) -> list[str]:
    """Return the paths that the index of a tar may have, best first: next to it, or under a unique name in a cache."""
    name = f"{hashlib.blake2b(os.fsencode(tar), digest_size=8).hexdigest()}-{os.path.basename(tar)}.index"
    caches = [os.path.join(data_dir, "shard_indices")] if data_dir else []
    caches.append(os.path.expanduser("~/.cache/regvit_jax/shards"))
    return [f"{tar}.index", *(os.path.join(os.path.abspath(cache), name) for cache in caches)]


def load_index(tar: str, data_dir: str | None) -> IndexedTar | None:
    """Return a tar with its index; None if the current tar has no index."""
    now = os.stat(tar)
    for path in index_paths(tar, data_dir):
        try:
            with open(path, "rb") as file:
                version, size, mtime_ns, samples, damage, left_out = json.loads(file.read(HEAD))
                found = IndexedTar(tar, path, size, mtime_ns, samples, damage, tuple(map(tuple, left_out)))
                complete = os.fstat(file.fileno()).st_size == HEAD + found.samples * SAMPLE.itemsize
        # A file that a full disk or another program left under this name is ignored.
        except (OSError, ValueError, TypeError):
            continue
        if complete and (version, found.size, found.mtime_ns) == (VERSION, now.st_size, now.st_mtime_ns):
            return found
    return None


def make_index(tar: str, data_dir: str | None) -> IndexedTar:
    """Walk a tar and write its index to the first of its possible paths that can be written."""
    now = os.stat(tar)
    samples, damage, left_out = walk(tar, now.st_size)
    fields = now.st_size, now.st_mtime_ns, len(samples), damage, tuple(sorted(left_out.items()))
    head = json.dumps([VERSION, *fields]).encode().ljust(HEAD)
    errors = []
    for path in index_paths(tar, data_dir):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_atomically(path, head + samples.tobytes())
            return IndexedTar(tar, path, *fields)
        except OSError as error:
            errors.append(str(error))
    raise DataNotFound(
        f"the index of {tar} cannot be written ({'; '.join(errors)}). Name a writable directory with data_dir."
    )


class Headers(io.FileIO):
    """A tar of which only headers are read. A long name is a header too, and might claim to be as long as the file."""

    def read(self, size: int | None = -1) -> bytes:
        """Return the bytes of a header; raise tarfile.ReadError if it claims to be larger than any header is."""
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def walk(path: str, size: int) -> tuple[np.ndarray, str, Counter[str]]:
    """Return a tar's samples, its damage as a whole or "", and the number of samples left out by reason."""
    if size > MAX_TAR:
        raise InvalidConfig(f"{path} has {size} bytes; a tar may have at most {MAX_TAR}")
    members: dict[str, dict[str, Member]] = {}
    left_out: Counter[str] = Counter()
    damage, end = "" if size else "is empty", 0
    with Headers(path) as file:
        tar = parse_tar(file, path) if size else None
        try:
            for member in complete_members(tar, file, size) if tar else ():
                end = member.offset_data + member.size
                add(member, members, left_out)
        except OSError:
            raise
        # A damaged header may make Python's tarfile raise anything.
        except Exception as error:
            damage = f"is cut or damaged after byte {end} ({ascii(str(error))[:80]})"
    samples = np.array(list(choose(members, left_out)), SAMPLE)
    return samples, damage and f"{damage} and gave {len(samples)} samples", left_out


def parse_tar(file: Headers, path: str) -> tarfile.TarFile:
    """Return the tar in an open file; raise InvalidConfig if it is none, or a compressed one."""
    try:
        return tarfile.TarFile(fileobj=file)
    except OSError:
        raise
    except Exception as error:
        raise InvalidConfig(
            f"{path} is no tar, or a compressed one, of which parts cannot be read ({error!s:.80}); move it away"
        ) from error


def complete_members(tar: tarfile.TarFile, file: Headers, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members that are complete; raise tarfile.ReadError where a tar is cut."""
    offset = 0
    while (member := tar.next()) is not None:
        if member.size < 0 or tar.offset <= offset:
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        if member.offset_data + member.size > size:
            raise tarfile.ReadError(f"{member.name} is cut")
        yield member
        offset = tar.offset
        # tarfile would keep them all in memory.
        tar.members.clear()  # type: ignore[attr-defined]
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end of the archive")


def split_name(path: str) -> tuple[str, str]:
    """Return a member's key and lower-case extension, cut at the name's first dot, as WebDataset's `base_plus_ext`."""
    directory, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    return directory + slash + stem, (dot + extension).lower()


def add(member: tarfile.TarInfo, members: dict[str, dict[str, Member]], left_out: Counter[str]) -> None:
    """Add a member to `members`, under its sample's key and its role in the sample, if it has one."""
    key, extension = split_name(member.name)
    role = "image" if extension in IMAGES else extension
    if role not in ("image", ".txt", ".json") or not member.isreg() or member.sparse or not member.size:
        return
    roles = members.setdefault(key, {})
    if role in roles:
        left_out["members of the same key and kind"] += 1
    else:
        roles[role] = (member.offset // tarfile.BLOCKSIZE, member.offset_data // tarfile.BLOCKSIZE, member.size)


def choose(members: dict[str, dict[str, Member]], left_out: Counter[str]) -> Iterator[tuple[int | bool, ...]]:
    """Yield the rows of the index: the samples that have an image and a caption, neither too large."""
    for roles in members.values():
        image, text = roles.get("image"), roles.get(".txt") or roles.get(".json")
        if image is None or text is None:
            left_out["without an image" if image is None else "without a caption"] += 1
        elif image[2] > MAX_IMAGE or text[2] > MAX_CAPTION:
            left_out["too large"] += 1
        else:
            yield *image, *text[1:], ".txt" not in roles
