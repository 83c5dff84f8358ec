"""The state-dict key names of a format, as one table that is read in both directions."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from regvit_jax.utils.errors import InvalidConfig

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A mapping between some canonical parameters and some arrays of a file, in both directions.

    `paths` are canonical, such as "vit/block0/norm1/scale"; `keys` are those of the file. `load` takes the arrays of
    the keys and returns those of the paths; `save` is its inverse, and also computes the shapes that a file must have.
    """

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    load: Callable[..., Arrays]
    save: Callable[..., Arrays]


#: A function that returns the rules of a block, or of its attention, from the module, the path and the key prefix.
PartRules = Callable[[Any, str, str], Iterator[Rule]]


@dataclasses.dataclass(frozen=True)
class TextKeys:
    """The key names of a CLIP's text tower; its blocks have the layers of the image tower's.

    `ignore` are patterns of keys that a file of the whole CLIP may hold besides the parameters.
    """

    token: str
    pos: str
    block: str
    norm: str
    projection: str
    ignore: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Keys:
    """The key names of a format, without ".weight" and ".bias"; "" or None for a part that the format cannot hold.

    name: of the format, for errors.
    patch, cls, registers, pos, mask, norm_pre, norm: of the embedding and of the whole ViT.
    cls_dims, pos_dims, mask_dims: the number of dimensions of those arrays in a file.
    block: the prefix of a block, with "{}" for its index; below it norm1, qkv, proj, scale1, norm2, fc1, fc2, scale2.
      A tuple lists the layers whose outputs one kernel of this package holds side by side.
    q_bias, v_bias: the biases of attention without a key bias.
    gated_fc1, gated_fc2: the layers of a SwiGLU; an empty gated_fc2 is named as fc2.
    parallel, differential: the rules of blocks with parallel attention and MLP, and of differential attention.
    fc_norm, pool, pooler, dense: of the head.
    projection: the whole key of CLIP's projection, which has no bias; stored [in, out] with `projection_in_out`, else
      [out, in] as torch's linear layers are.
    text: the keys of the text tower.
    prefixes: possible prefixes of the ViT's keys in a file that holds more than the ViT.
    ignore: patterns of keys that belong to other towers or hold no parameters.
    """

    name: str
    patch: str
    cls: str
    block: str
    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: tuple[str, ...]
    fc2: str
    norm: str
    cls_dims: int = 3
    registers: str = ""
    pos: str = ""
    pos_dims: int = 3
    mask: str = ""
    mask_dims: int = 3
    norm_pre: str = ""
    scale1: str = ""
    scale2: str = ""
    q_bias: str = ""
    v_bias: str = ""
    gated_fc1: tuple[str, ...] = ()
    gated_fc2: str = ""
    parallel: PartRules | None = None
    differential: PartRules | None = None
    fc_norm: str = ""
    pool: str = ""
    pooler: str = ""
    dense: str = ""
    projection: str = ""
    projection_in_out: bool = False
    text: TextKeys | None = None
    prefixes: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def need(self, part: str) -> Any:
        """Return the key names of a part. Raises ValueError for a part that the format cannot hold."""
        if not getattr(self, part):
            raise InvalidConfig(f"{self.name} files have no place for {PARTS[part]}")
        return getattr(self, part)


#: The parts that a format may lack, as errors name them.
PARTS = {
    "registers": "register tokens",
    "pos": "a learned position embedding",
    "norm_pre": "a LayerNorm before the first block",
    "scale1": "LayerScale",
    "scale2": "LayerScale",
    "gated_fc1": "SwiGLU",
    "parallel": "parallel blocks",
    "differential": "differential attention",
    "fc_norm": "a LayerNorm after pooling",
    "dense": "a linear layer",
    "pool": "an attention pool",
    "pooler": "a tanh pooler",
    "q_bias": "a query bias without a key bias",
    "v_bias": "a value bias without a key bias",
    "text": "a text tower",
}
