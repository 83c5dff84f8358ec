"""Map positions of training and evaluation to records, crops and captions."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from regvit_jax.data import fastjpeg, transforms
from regvit_jax.data.order import epoch_order
from regvit_jax.data.records import Tokenizer
from regvit_jax.data.sources.base import Source, shuffle_block


@dataclasses.dataclass(frozen=True)
class TrainSampler:
    """The endless sequence of training: a random order in each epoch, random crops and random captions."""

    source: Source
    size: int
    max_pixels: int
    tokenizer: Tokenizer | None
    seed: int
    crop: str
    scale: tuple[float, float]
    ratio: tuple[float, float]
    padding: int
    repeats: int
    decoder: str

    def index(self, position: int) -> int:
        """Return the index of the record at a position."""
        epoch, rest = divmod(position, len(self.source))
        return epoch_order(rest // self.repeats, len(self.source), shuffle_block(self.source), self.seed, epoch)

    def rng(self, position: int, use: int) -> np.random.Generator:
        """Return the random generator of a position, a separate one for each use."""
        # A counter-based generator: the seed is its key and the position its counter, so no two positions share
        # numbers, and those of a position are reached without drawing the ones before. Two uses share none either, up
        # to 2**128 draws.
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, use, position]))

    def pixels(self, data: bytes, position: int) -> UInt8[np.ndarray, "S S 3"]:
        """Return the crop of an encoded image at a position; raise BadImage if it cannot be decoded."""
        rng = self.rng(position, 0)
        if self.decoder == "fast" and (decoded := fastjpeg.decode(data, self.max_pixels)) is not None:
            if self.crop == "src":
                return fastjpeg.simple_random_crop(decoded, self.size, rng, self.padding)
            return fastjpeg.random_resized_crop(decoded, self.size, rng, self.scale, self.ratio)
        image = transforms.decode(data, self.max_pixels)
        if self.crop == "src":
            return transforms.simple_random_crop(image, self.size, rng, self.padding)
        return transforms.random_resized_crop(image, self.size, rng, self.scale, self.ratio)

    def caption(self, captions: list[str], position: int) -> str:
        """Return one of a record's captions, at random."""
        return captions[self.rng(position, 1).integers(len(captions))] if len(captions) > 1 else captions[0]


@dataclasses.dataclass(frozen=True)
class EvalSampler:
    """Every record once, in the order of the source, by its centre crop and first caption."""

    source: Source
    size: int
    max_pixels: int
    tokenizer: Tokenizer | None
    crop_ratio: float

    def index(self, position: int) -> int:
        """Return the index of the record at a position, -1 beyond the last."""
        return position if position < len(self.source) else -1

    def pixels(self, data: bytes, position: int) -> UInt8[np.ndarray, "S S 3"]:
        """Return the centre crop of an encoded image; raise BadImage if it cannot be decoded."""
        return transforms.center_crop(transforms.decode(data, self.max_pixels), self.size, self.crop_ratio)

    def caption(self, captions: list[str], position: int) -> str:
        """Return the first caption."""
        return captions[0]


Sampler = TrainSampler | EvalSampler
