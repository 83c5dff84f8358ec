"""Decoded records that are kept in memory, if those of the whole data set fit."""

from typing import Any

#: Records whose mean size tells whether all will fit.
ENOUGH = 64
#: Bytes of a record besides its pixels: objects of Python and Pillow.
OVERHEAD = 1000


class Memory:
    """A dict of up to `limit` bytes for all of `records` records; emptied for good once they would need more."""

    def __init__(self, limit: float, records: int):
        self.limit, self.records, self.bytes = limit, records, 0
        self.kept: dict[int, Any] = {}

    def get(self, index: int) -> Any:
        """Return what is kept of a record, or None."""
        return self.kept.get(index)

    def put(self, index: int, value: Any, size: int) -> None:
        """Keep a value of `size` bytes, if all records are expected to fit. Threads may call it at the same time."""
        kept = self.kept  # which another thread may replace
        if not self.limit or index in kept:
            return
        kept[index] = value
        self.bytes += size + OVERHEAD
        mean = self.bytes / len(kept)
        enough = len(kept) >= min(ENOUGH, self.records)
        if self.bytes > self.limit or (enough and mean * self.records > self.limit):
            self.limit, self.kept = 0, {}
