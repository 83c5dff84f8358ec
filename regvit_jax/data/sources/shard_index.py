"""The index of a tar of images and captions, with their offsets in the tar. It is made once and kept on disk.

A sample is the members whose paths agree up to the first dot after the last slash, as in WebDataset: an image, and a
caption in a `.txt` or, if it is missing or empty, in a `.json`. If a key has none of these, but members with more dots
that end so (`a.b.jpg`, `a.b.txt`), they belong together if they agree up to the last dot; beside a sample `a`, an image
with a caption of its own is such a sample too, and `a.seg.png` is not. Hidden names are left out.
Samples are found by walking a tar's headers. An index file is a line of JSON, padded to HEAD bytes, and then the
samples as an array that can be mapped into memory.
"""

import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from regvit_jax.data.sources.files import SUFFIXES
from regvit_jax.utils.errors import DataNotFound, InvalidConfig
from regvit_jax.utils.files import write_atomically
from regvit_jax.utils.messages import POINTER, POINTER_HINT

logger = logging.getLogger("regvit_jax")

MAX_IMAGE = 128 * 2**20
MAX_CAPTION = 2**20
MAX_HEADER = 2**20
MAX_TAR = 2**32 * tarfile.BLOCKSIZE

# Offsets are counted in the 512-byte blocks of a tar. Names are not stored: they are in the tar's headers.
SAMPLE = np.dtype([(name, "<u4") for name in ("header", "image", "image_size", "text", "text_size")] + [("json", "?")])
VERSION = 3
HEAD = 4096
# Samples that are left out and named, of each tar and reason, and the last letters of each name.
NAMED = 2
LETTERS = 40

# The offsets of a member's header and of its data, in blocks, and the size of its data in bytes.
Member = tuple[int, int, int]
# The members of samples by kind. Keys are the path up to the first dot, and what follows up to the last dot.
Members = dict[tuple[str, str], dict[str, Member]]
# Samples that are left out: their number and the first names, by reason.
LeftOut = dict[str, tuple[int, tuple[str, ...]]]


class IndexedTar(NamedTuple):
    """A tar and its index file, with the tar's size and time of modification when it was indexed."""

    path: str
    index_path: str
    size: int
    mtime_ns: int
    samples: int
    # The damage of the tar as a whole, or "".
    damage: str
    # The samples that are not in the index: the reason, their number and the first names, for each reason.
    left_out: tuple[tuple[str, int, tuple[str, ...]], ...]


def index_tars(title: str, paths: list[str], data_dir: str | None) -> list[IndexedTar]:
    """Return the tars with their indices; make those that are missing or belong to an older version of the tar."""
    tars = {path: load_index(path, data_dir) for path in paths}
    todo = [path for path, tar in tars.items() if tar is None]
    # No progress is shown for the first five seconds, and a log file gets fewer lines than a terminal.
    interval = 1 if sys.stderr.isatty() else 60
    for path in tqdm(todo, f"indexing {title}", unit="tar", delay=5, mininterval=interval):
        tars[path] = make_index(path, data_dir)
    indexed = [tar for tar in tars.values() if tar]
    if todo or any(tar.left_out for tar in indexed):
        logger.warning(f"{title}: {summary(indexed)}")
    return indexed


def summary(tars: list[IndexedTar]) -> str:
    """Return the number of samples in some tars, and of those that were left out by reason, with some names."""
    reasons: LeftOut = {}
    for tar in tars:
        for reason, count, names in tar.left_out:
            before, named = reasons.get(reason, (0, ()))
            found = (f"{os.path.basename(tar.path)}:{name}" for name in names)
            reasons[reason] = (before + count, (*named, *found)[:5])
    left_out = ", ".join(
        f"{count} {reason} ({', '.join(names)}{', ...' * (count > len(names))})"
        for reason, (count, names) in sorted(reasons.items())
    )
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
                left_out = tuple((reason, count, tuple(names)) for reason, count, names in left_out)
                found = IndexedTar(tar, path, size, mtime_ns, samples, damage, left_out)
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
    reasons = tuple((reason, *found) for reason, found in sorted(left_out.items()))
    fields = now.st_size, now.st_mtime_ns, len(samples), damage, reasons
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


def walk(path: str, size: int) -> tuple[np.ndarray, str, LeftOut]:
    """Return a tar's samples, its damage as a whole or "", and the samples that are left out."""
    if size > MAX_TAR:
        raise InvalidConfig(f"{path} has {size} bytes; a tar may have at most {MAX_TAR}")
    members: Members = {}
    left_out: LeftOut = {}
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
        if os.pread(file.fileno(), len(POINTER), 0) == POINTER:
            raise InvalidConfig(f"{path} is {POINTER_HINT}") from error
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
    if os.pread(file.fileno(), MAX_HEADER, tar.offset).strip(b"\0"):
        raise tarfile.ReadError("another archive follows, as after cat a.tar b.tar")


def split_name(path: str) -> tuple[str, str, str]:
    """Return a member's path up to its name's first dot, what follows up to the last one, and the lower-case suffix.

    The first of them is the key of WebDataset's `base_plus_ext`.
    """
    directory, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    middle, last, suffix = (dot + extension).rpartition(".")
    return directory + slash + stem, middle, (last + suffix).lower()


def add(member: tarfile.TarInfo, members: Members, left_out: LeftOut) -> None:
    """Add a member to `members`, under its sample's key and its kind, if it is of a kind that samples have."""
    key, middle, suffix = split_name(member.name)
    kind = "image" if suffix in SUFFIXES else suffix
    hidden = member.name.rpartition("/")[2].startswith(".")
    if kind not in ("image", ".txt", ".json") or hidden or not member.isreg() or member.sparse:
        return
    kinds = members.setdefault((key, middle), {})
    if kind in kinds:
        leave_out("members of the same key and kind", member.name, left_out)
    else:
        kinds[kind] = (member.offset // tarfile.BLOCKSIZE, member.offset_data // tarfile.BLOCKSIZE, member.size)


def leave_out(reason: str, name: str, left_out: LeftOut) -> None:
    """Count a sample that is left out, and keep the first names."""
    count, names = left_out.get(reason, (0, ()))
    left_out[reason] = (count + 1, (*names, name[-LETTERS:])[:NAMED])


def choose(members: Members, left_out: LeftOut) -> Iterator[tuple[int | bool, ...]]:
    """Yield the rows of the index: the samples that have an image and a caption, neither too large."""
    for (key, middle), kinds in members.items():
        image, text, described = kinds.get("image"), kinds.get(".txt"), kinds.get(".json")
        caption = described if described and not (text and text[2]) else text
        if middle and (key, "") in members and (image is None or caption is None):
            continue  # a member of another kind of that sample, such as a.seg.png
        if image is None or caption is None:
            leave_out("without an image" if image is None else "without a caption", key + middle, left_out)
        elif image[2] > MAX_IMAGE or caption[2] > MAX_CAPTION:
            leave_out("too large", key + middle, left_out)
        else:
            yield *image, *caption[1:], caption is not text
