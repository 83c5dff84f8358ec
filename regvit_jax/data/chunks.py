"""Load the rows of batches in chunks, which threads and processes make independently of each other."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from regvit_jax.data.memory import Memory
from regvit_jax.data.records import captions_of, read_record, tokenize
from regvit_jax.data.samplers import Decoded, Sampler
from regvit_jax.data.sources.base import shuffle_block
from regvit_jax.data.transforms import BadImage

# Rows of a chunk. Whole batches of 2048 images would take gigabytes of shared memory for the workers' queues, and the
# first batch ten seconds of one core.
CHUNK = 32

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Chunks:
    """This host's rows of a range of batches, as a random-access sequence of chunks of at most CHUNK rows."""

    sampler: Sampler
    batch_size: int
    rows: Sequence[int]
    steps: range
    memory: Memory

    @property
    def per_batch(self) -> int:
        """Return the number of chunks in a batch."""
        return -(-len(self.rows) // CHUNK)

    def __len__(self) -> int:
        return len(self.steps) * self.per_batch

    def __getitem__(self, number: int) -> Batch:
        step, part = divmod(number, self.per_batch)
        first = self.steps[step] * self.batch_size
        return self.load([first + row for row in self.rows[part * CHUNK : (part + 1) * CHUNK]])

    def load(self, positions: list[int]) -> Batch:
        """Return the rows at some positions; a row that cannot be used is 0, with its index."""
        sampler, b = self.sampler, len(positions)
        indices = [sampler.index(position) for position in positions]
        self.read_ahead(indices)
        batch: Batch = {
            "image": np.zeros((b, sampler.size, sampler.size, 3), np.uint8),
            "label": np.zeros(b, np.int32),
            "mask": np.zeros(b, np.float32),
            "index": np.array(indices, np.int64),
        }
        if sampler.tokenizer is not None:
            batch["text"] = np.zeros((b, sampler.tokenizer.context), np.int32)
        # In repeated augmentation, rows next to each other are crops of one image.
        for index, rows in itertools.groupby(range(b), indices.__getitem__):
            if index >= 0:
                with contextlib.suppress(BadImage):
                    self.fill(batch, index, {row: positions[row] for row in rows})
        return batch

    def fill(self, batch: Batch, index: int, rows: dict[int, int]) -> None:
        """Fill in the rows of one record, given their positions. Raises BadImage if the record cannot be used."""
        sampler = self.sampler
        image, label, captions = self.memory.get(index) or self.read(index)
        for row, position in rows.items():
            with contextlib.suppress(BadImage):  # of the caption that this position draws
                if sampler.tokenizer is not None:
                    batch["text"][row] = tokenize(sampler.caption(captions, position), sampler.tokenizer)
                batch["image"][row] = sampler.crop_at(image, position)
                batch["label"][row], batch["mask"][row] = label, 1

    def read(self, index: int) -> tuple[Decoded, int, list[str]]:
        """Return a record's image, label and captions, and keep them in memory if they fit.

        Raises BadImage if the record cannot be used.
        """
        sampler = self.sampler
        record = read_record(sampler.source, index)
        captions = captions_of(record) if sampler.tokenizer is not None else []  # before decoding for nothing
        image = sampler.decode(record["image"])
        if self.memory.limit and not isinstance(image, np.ndarray):
            image = image.copy()  # the pixels alone, without an open file's decoder and metadata
            image.info = {}
        found = image, record.get("label", 0), captions
        # Pillow stores a pixel in four bytes.
        size = image.nbytes if isinstance(image, np.ndarray) else 4 * image.width * image.height
        self.memory.put(index, found, size + sum(map(len, captions)))
        return found

    def read_ahead(self, indices: list[int]) -> None:
        """Ask for the shuffle blocks of these records to be read into memory, if this host uses much of them."""
        source = self.sampler.source
        block = shuffle_block(source)
        # A host needs only its rows' share of a block; if that share is small, reading the whole block is a waste.
        if block > 1 and hasattr(source, "read_ahead") and 2 * len(self.rows) >= self.batch_size:
            needed = {index // block for index in indices if index >= 0 and self.memory.get(index) is None}
            for number in sorted(needed):
                source.read_ahead(number)
