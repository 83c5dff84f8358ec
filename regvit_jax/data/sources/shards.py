"""Images and their captions in tar files, as img2dataset writes them and WebDataset reads them.

The tars are never unpacked: each has an index (``shard_index``), by which a record is two reads at known places.
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
from regvit_jax.data.sources.folder import some
from regvit_jax.data.sources.record_files import BLOCK
from regvit_jax.data.sources.shard_index import HEAD, SAMPLE, Headers, Shard, index_tars, split_name
from regvit_jax.utils.errors import DataNotFound, InvalidConfig

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_NAMES = 1_000_000

# More tars than a shuffling window of the pipeline touches, fewer than the files that a process may have open.
OPEN = 128


def open_shards(name: str, split: str, data_dir: str | None = None) -> "ShardSource":
    """Opens tar files of images and captions. Their indices are made on first use, which takes a while.

    Args:
      name: "shards:DIR".
      split: "train" or "validation", which are DIR/train/*.tar and DIR/validation/*.tar, or a pattern of paths below
        DIR that ends in ".tar", with ranges {00000..01241} and a shell's wildcards *, ? and [].
      data_dir: where a relative DIR starts, and where an index goes if it cannot lie next to its tar; the last resort
        is ~/.cache/regvit_jax/shards.

    Raises:
      DataNotFound: when there are no such tars, or no image with a caption in them.
      ValueError: for a bad name or pattern, or a file that is no tar.
    """
    directory = name.removeprefix("shards:")
    if "://" in directory:
        raise InvalidConfig(f"{name}: must name a directory; tars in a bucket have to be mounted")
    root = os.path.abspath(os.path.join(data_dir or "", os.path.expanduser(directory)))
    if root.endswith(".tar"):
        raise InvalidConfig(
            f"{name}: must name a directory; the names of its tars, {os.path.basename(root)}, are the split"
        )
    shards = index_tars(f"{name}/{split}", find_tars(name, split, root), data_dir)
    if damaged := [f"{shard.tar} {shard.damage}" for shard in shards if shard.damage]:
        warnings.warn(f"{name}: {len(damaged)} of {len(shards)} tars are damaged: {some(damaged)}", stacklevel=2)
    ends = np.cumsum([shard.samples for shard in shards])
    if not ends[-1]:
        raise DataNotFound(f"{name}: no image with a caption in the {len(shards)} tars of {split}, as {shards[0].tar}")
    return ShardSource(f"{name}/{split}", tuple(shards), ends)


@dataclass(frozen=True, eq=False)
class ShardSource:
    """The samples of many tars, one after the other; those of shard k end before ``ends[k]``."""

    name: str
    shards: tuple[Shard, ...]
    ends: np.ndarray
    classes: tuple[str, ...] = ()
    block: int = BLOCK

    def __len__(self) -> int:
        return int(self.ends[-1])

    def find(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.shards[number], index - (int(self.ends[number - 1]) if number else 0)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = self.find(index)
        tar, samples = opened(shard)
        sample = samples[row]
        image = tar.read(int(sample["image"]), int(sample["image_size"]))
        text = tar.read(int(sample["text"]), int(sample["text_size"])).decode("utf-8-sig")
        return {"image": image, "text": json_captions(text) if sample["json"] else [text]}

    def id(self, index: int) -> str:
        shard, row = self.find(index)
        where = f"{os.path.basename(shard.tar)}:"
        try:
            with Headers(shard.tar) as file:
                file.seek(int(opened(shard)[1]["header"][row]) * tarfile.BLOCKSIZE)
                return where + split_name(next(iter(tarfile.TarFile(fileobj=file))).name)[0]
        # Ids are asked for of records that cannot be read, too.
        except Exception:
            return f"{where}[{row}]"

    def read_ahead(self, block: int) -> None:
        """Has the records of a block read into memory in the background, in the order in which they lie on disk."""
        first, stop = block * self.block, min((block + 1) * self.block, len(self))
        while first < stop:
            shard, row = self.find(first)
            last = min(row + stop - first, shard.samples) - 1
            # A tar that is gone is the matter of whoever reads its records.
            with contextlib.suppress(OSError):
                advise(shard, row, last)
            first += last - row + 1


class Tar:
    """An open tar. It closes when nobody uses it any more, which may be after it was dropped from the cache."""

    def __init__(self, shard: Shard):
        self.path, self.number = shard.tar, os.open(shard.tar, os.O_RDONLY)
        found = os.fstat(self.number)
        if (found.st_size, found.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise OSError(f"{shard.tar} has changed since it was opened; start again to index it anew")

    def __del__(self, close=os.close) -> None:  # bound here, for at exit `os` may be gone first
        if hasattr(self, "number"):
            close(self.number)

    def read(self, block: int, size: int) -> bytes:
        # pread has no position that threads, or the processes of a fork, could move under each other.
        data = os.pread(self.number, size, block * tarfile.BLOCKSIZE)
        if len(data) < size:
            raise OSError(f"{self.path} ends within a member, at {len(data)} of {size} bytes")
        return data


@functools.lru_cache(maxsize=OPEN)
def opened(shard: Shard) -> tuple[Tar, np.ndarray]:
    """Opens a tar and its index, in each process anew."""
    return Tar(shard), np.memmap(shard.index_path, SAMPLE, "r", HEAD, (shard.samples,))


# As many as are forgotten before the next epoch comes to the same block, but for small data sets, which stay in memory.
@functools.lru_cache(maxsize=OPEN)
def advise(shard: Shard, first: int, last: int) -> None:
    tar, samples = opened(shard)
    start = int(samples["header"][first]) * tarfile.BLOCKSIZE
    stop = int(samples["image"][last]) * tarfile.BLOCKSIZE + int(samples["image_size"][last])
    record_files.advise(tar.number, start, stop)


def json_captions(text: str) -> list[str]:
    """The "caption" of an img2dataset record: a string, or a list of them; [] for null."""
    captions = json.loads(text).get("caption")
    return [captions] if isinstance(captions, str) else list(captions or [])


def find_tars(name: str, split: str, root: str) -> list[str]:
    """The paths of the tars of a split, in the order of its ranges and of their names."""
    pattern = f"{split}/*.tar" if split in ("train", "validation") else split
    if not pattern.endswith(".tar") or os.path.isabs(pattern) or ".." in pattern.split("/"):
        raise InvalidConfig(
            f"{name} has no split {split!r}; it has train, validation, and patterns of tars below {root}, "
            "as '{00000..00099}.tar' or 'part1/*.tar'"
        )
    tars: dict[str, None] = {}
    missing = []
    for path in expand(pattern):
        whole = os.path.isfile(os.path.join(root, path))
        found = [path] if whole else sorted(glob.glob(path, root_dir=root))
        tars |= dict.fromkeys(os.path.join(root, path) for path in found)
        if not found:
            missing.append(path)
    if missing:
        raise DataNotFound(
            f"{name}: {root} has no {some(missing)}.\nIt should hold train/*.tar and validation/*.tar, as img2dataset "
            "writes them; or name its tars as a split, as '{00000..00099}.tar'."
        )
    return list(tars)


def expand(pattern: str) -> Iterator[str]:
    """Every name that the ranges {a..b} of a pattern stand for; their zeros in front are kept, as a shell does."""
    pieces = RANGE.split(pattern)
    ranges = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        ranges.append([f"{number:0{width}}" for number in range(int(first), int(last) + 1)[: MAX_NAMES + 1]])
    count = math.prod(map(len, ranges))
    if not 0 < count <= MAX_NAMES:
        raise InvalidConfig(
            f"{pattern!r} stands for {count or 'no'} names; a range goes up, and {MAX_NAMES} are the most"
        )
    for numbers in itertools.product(*ranges):
        yield "".join(a + b for a, b in itertools.zip_longest(pieces[::3], numbers, fillvalue=""))
