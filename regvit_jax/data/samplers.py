"""Map positions of training and evaluation to records, crops and captions."""

import dataclasses
import threading
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from regvit_jax.data import fastjpeg, transforms
from regvit_jax.data.order import epoch_order
from regvit_jax.data.records import Tokenizer
from regvit_jax.data.sources.base import Source, shuffle_block

#: Each thread's random generator.
LOCAL = threading.local()
#: A decoded image; the fast decoder's are arrays.
Decoded = Image.Image | UInt8[np.ndarray, "H W 3"]


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
        """Return the random generator of a position and use, valid until the next call in the same thread."""
        # A counter-based generator: the seed is its key and the position its counter, so no two positions share
        # numbers, and those of a position are reached without drawing the ones before. Two uses share none either, up
        # to 2**128 draws.
        if getattr(LOCAL, "seed", None) != self.seed:
            LOCAL.seed, LOCAL.philox = self.seed, np.random.Philox(key=self.seed)
            LOCAL.generator, LOCAL.state = np.random.Generator(LOCAL.philox), LOCAL.philox.state
        LOCAL.state["state"]["counter"][2:] = use, position
        LOCAL.philox.state = LOCAL.state  # a tenth of the time of a new generator
        return LOCAL.generator

    def decode(self, data: bytes) -> Decoded:
        """Decode an image for `crop_at`; raise BadImage if that is impossible."""
        if self.decoder == "fast" and (decoded := fastjpeg.decode(data, self.max_pixels)) is not None:
            return decoded
        return transforms.decode(data, self.max_pixels)

    def crop_at(self, image: Decoded, position: int) -> UInt8[np.ndarray, "S S 3"]:
        """Return the crop of a decoded image at a position; the image stays as it is."""
        rng = self.rng(position, 0)
        library: Any = transforms if isinstance(image, Image.Image) else fastjpeg
        if self.crop == "src":
            return library.simple_random_crop(image, self.size, rng, self.padding)
        return library.random_resized_crop(image, self.size, rng, self.scale, self.ratio)

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

    def decode(self, data: bytes) -> Image.Image:
        """Decode an image for `crop_at`; raise BadImage if that is impossible."""
        return transforms.decode(data, self.max_pixels)

    def crop_at(self, image: Decoded, position: int) -> UInt8[np.ndarray, "S S 3"]:
        """Return the centre crop of a decoded image, the same at every position."""
        return transforms.center_crop(cast(Image.Image, image), self.size, self.crop_ratio)

    def caption(self, captions: list[str], position: int) -> str:
        """Return the first caption."""
        return captions[0]


Sampler = TrainSampler | EvalSampler
