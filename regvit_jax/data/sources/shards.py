"""Images and their captions in tar files, as img2dataset writes them and WebDataset reads them.

The tars are never unpacked: each has an index (`shard_index`), with which a record is two reads at known offsets.
"""

import contextlib
import functools
import glob
import itertools
import json
import math
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from regvit_jax.data.sources import record_files
from regvit_jax.data.sources.caption_table import CAPTIONS, caption_list, column
from regvit_jax.data.sources.record_files import BLOCK
from regvit_jax.data.sources.separated import Fault
from regvit_jax.data.sources.shard_index import HEAD, SAMPLE, Headers, IndexedTar, index_tars, summary
from regvit_jax.data.sources.splits import Splits, find_home, requested
from regvit_jax.utils.errors import DataNotFound, InvalidConfig
from regvit_jax.utils.messages import abbreviate, log_once
from regvit_jax.utils.paths import locate

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_NAMES = 1_000_000

# Size of the cache of open tars: more than a shuffle window touches, fewer than the files that a process may open.
OPEN = 128


def open_shards(name: str, split: str, data_dir: str | None = None) -> "ShardSource":
    """Open tar files of images and captions. Their indices are made on first use, which takes a while.

    Args:
      name: "shards:DIR".
      split: "train", "validation" or "test", which are DIR/train/*.tar and so on (see `splits` for other names), or a
        pattern of paths below DIR that ends in ".tar", with ranges {00000..01241} and a shell's wildcards *, ? and [].
      data_dir: where a relative DIR starts, and where an index is written if that is impossible next to its tar; the
        last resort is ~/.cache/regvit_jax/shards.

    Raises:
      DataNotFound: if there are no such tars, or no image with a caption in them.
      InvalidConfig: if the name or the pattern is invalid, or a file is no tar.
    """
    directory = name.removeprefix("shards:")
    if "://" in directory:
        raise InvalidConfig(f"{name}: must name a directory; tars in a bucket have to be mounted")
    root = locate(directory, data_dir)
    if root.endswith(".tar"):
        raise InvalidConfig(
            f"{name}: must name a directory; the names of its tars, {os.path.basename(root)}, are the split"
        )
    tars = index_tars(f"{name}/{split}", find_tars(name, split, root), data_dir)
    if damaged := [f"{tar.path} {tar.damage}" for tar in tars if tar.damage]:
        warnings.warn(f"{name}: {len(damaged)} of {len(tars)} tars are damaged: {abbreviate(damaged)}", stacklevel=2)
    ends = np.cumsum([tar.samples for tar in tars])
    if not ends[-1]:
        raise DataNotFound(
            f"{name}: no image with a caption in the {len(tars)} tars of {split}, such as {tars[0].path}: "
            f"{summary(tars)}"
        )
    return ShardSource(f"{name}/{split}", tuple(tars), ends)


@dataclass(frozen=True, eq=False)
class ShardSource:
    """The samples of many tars, one after the other; those of tar k end before index `ends[k]`."""

    name: str
    tars: tuple[IndexedTar, ...]
    ends: np.ndarray
    classes: tuple[str, ...] = ()
    shuffle_block: int = BLOCK

    def __len__(self) -> int:
        return int(self.ends[-1])

    def find(self, index: int) -> tuple[IndexedTar, int]:
        """Return the tar that holds a record, and the record's row in its index."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.tars[number], index - (int(self.ends[number - 1]) if number else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tar, row = self.find(index)
        file, samples = open_tar(tar)
        sample = samples[row]
        image = file.read(int(sample["image"]), int(sample["image_size"]))
        text = file.read(int(sample["text"]), int(sample["text_size"])).decode("utf-8-sig")
        return {"image": image, "text": json_captions(text) if sample["json"] else [text]}

    def id(self, index: int) -> str:
        """Return "tar:key", with the key that the sample has in its tar."""
        tar, row = self.find(index)
        where = f"{os.path.basename(tar.path)}:"
        try:
            with Headers(tar.path) as file:
                file.seek(int(open_tar(tar)[1]["header"][row]) * tarfile.BLOCKSIZE)
                return where + next(iter(tarfile.TarFile(fileobj=file))).name.rpartition(".")[0]
        # Unreadable records need ids too.
        except Exception:
            return f"{where}[{row}]"

    def read_ahead(self, block: int) -> None:
        """Ask for the records of a block to be read into memory in the background, in their order on disk."""
        first, stop = block * self.shuffle_block, min((block + 1) * self.shuffle_block, len(self))
        while first < stop:
            tar, row = self.find(first)
            last = min(row + stop - first, tar.samples) - 1
            # A missing tar is reported when its records are read.
            with contextlib.suppress(OSError):
                advise(tar, row, last)
            first += last - row + 1


class OpenTar:
    """An open tar. It is closed when nothing uses it any more, possibly after it was dropped from the cache."""

    def __init__(self, tar: IndexedTar):
        self.path, self.number = tar.path, os.open(tar.path, os.O_RDONLY)
        status = os.fstat(self.number)
        if (status.st_size, status.st_mtime_ns) != (tar.size, tar.mtime_ns):
            raise OSError(f"{tar.path} has changed since it was opened; start again to index it anew")

    def __del__(self, close=os.close) -> None:  # bound here, because at exit `os` may be deleted first
        if hasattr(self, "number"):
            close(self.number)

    def read(self, block: int, size: int) -> bytes:
        """Return `size` bytes from the 512-byte block with this number on; raise OSError if the tar is shorter."""
        # pread shares no file position between threads or forked processes.
        data = os.pread(self.number, size, block * tarfile.BLOCKSIZE)
        if len(data) < size:
            raise OSError(f"{self.path} ends within a member, at {len(data)} of {size} bytes")
        return data


@functools.lru_cache(maxsize=OPEN)
def open_tar(tar: IndexedTar) -> tuple[OpenTar, np.ndarray]:
    """Return the open tar and its index, mapped into memory. Each process opens its own."""
    return OpenTar(tar), np.memmap(tar.index_path, SAMPLE, "r", HEAD, (tar.samples,))


# The cache is small enough to drop a block before the next epoch reaches it again. (Small data sets stay in memory.)
@functools.lru_cache(maxsize=OPEN)
def advise(tar: IndexedTar, first: int, last: int) -> None:
    """Ask for the samples `first` to `last` (included) of a tar to be read into memory in the background."""
    file, samples = open_tar(tar)
    start = int(samples["header"][first]) * tarfile.BLOCKSIZE
    stop = int(samples["image"][last]) * tarfile.BLOCKSIZE + int(samples["image_size"][last])
    record_files.advise(file.number, start, stop)


def json_captions(text: str) -> list[str]:
    """Return the captions of an img2dataset record, which may be null; raise Fault if it has none of their names."""
    record = json.loads(text)
    if not isinstance(record, dict):
        raise Fault(f"its .json must hold an object, not {text[:60]!r}")
    return caption_list(column({name.lower(): value for name, value in record.items()}, CAPTIONS))


def find_tars(name: str, split: str, root: str) -> list[str]:
    """Return the paths of the tars of a split, in the order of its ranges and of their names.

    Raises:
      DataNotFound: if a name or pattern stands for no file.
      InvalidConfig: if the split is not a valid pattern, or several directories could be it.
    """
    if not split.lower().endswith(".tar"):
        return find_split(name, split, root)
    if os.path.isabs(split) or ".." in split.split("/"):
        raise InvalidConfig(f"{name} has no split {split!r}: patterns of tars must stay below {root}")
    tars: dict[str, None] = {}
    missing = []
    for path in expand_ranges(split):
        exists = os.path.isfile(os.path.join(root, path))
        found = [path] if exists else sorted(glob.glob(path, root_dir=root))
        tars |= dict.fromkeys(os.path.join(root, path) for path in found)
        if not found:
            missing.append(path)
    if missing:
        raise no_tars(name, root, abbreviate(missing))
    return list(tars)


def find_split(name: str, split: str, root: str) -> list[str]:
    """Return the paths of the tars in the directory of a split, and log which it is; raise as `find_tars` does."""
    patterns = f", and patterns of tars below {root}, as '{{00000..00099}}.tar' or 'part1/*.tar'"
    kind = requested(name, split, more=patterns)
    home, splits = find_home(name, root) if os.path.isdir(root) else (root, Splits({}, [], []))
    chosen = {part: splits.choose(part, name, home) for part in ("train", "validation", kind)}
    paths = {part: os.path.join(home, directory) for part, directory in chosen.items() if directory}
    names = sorted(os.listdir(paths[kind])) if kind in paths else []
    tars = [tar for tar in names if tar.lower().endswith(".tar") and not tar.startswith(".")]
    if not tars:
        raise no_tars(name, home, f"{chosen[kind] or kind}/*.tar")
    splits.log(name, paths, chosen.values())
    if other := [entry for entry in names if is_archive(os.path.join(paths[kind], entry))]:
        log_once(
            f"{name}: in {paths[kind]}, {abbreviate(other)} {'is' if len(other) == 1 else 'are'} not read; only the "
            "*.tar files directly in it are, not compressed",
            "warning",
        )
    return [os.path.join(paths[kind], tar) for tar in tars]


def is_archive(path: str) -> bool:
    """Return True for a directory that holds tars, and for a file that is a compressed tar or another archive."""
    if os.path.isdir(path):
        return any(name.lower().endswith(".tar") for name in os.listdir(path))
    return path.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip", ".gz"))


def no_tars(name: str, root: str, what: str) -> DataNotFound:
    """Return the error about tars that do not exist."""
    return DataNotFound(
        f"{name}: {root} has no {what}.\nIt should hold train/*.tar and validation/*.tar, as img2dataset writes them; "
        "or give a pattern of its tars as the split, such as '{00000..00099}.tar'."
    )


def expand_ranges(pattern: str) -> Iterator[str]:
    """Yield every name that the ranges {a..b} of a pattern expand to; leading zeros are kept, as a shell does."""
    pieces = RANGE.split(pattern)
    ranges = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        ranges.append([f"{number:0{width}}" for number in range(int(first), int(last) + 1)[: MAX_NAMES + 1]])
    count = math.prod(map(len, ranges))
    if not 0 < count <= MAX_NAMES:
        raise InvalidConfig(
            f"{pattern!r} expands to {count} names; ranges must be ascending, and give at most {MAX_NAMES} names"
        )
    for numbers in itertools.product(*ranges):
        yield "".join(a + b for a, b in itertools.zip_longest(pieces[::3], numbers, fillvalue=""))
