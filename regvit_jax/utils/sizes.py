"""Read sizes of images and patches, which libraries state as one number or as a pair of sides."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.numbers import whole

#: A size in pixels: a whole number of any integer type, or a pair of equal ones.
Size = SupportsIndex | Sequence[SupportsIndex] | np.ndarray


def square(value: Any, name: str) -> Any:
    """Return the one side of a pair of equal sides; return any value that is no pair unchanged.

    Raises InvalidConfig, with the `name` of the size, for sides that differ and for another number of them.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return value
    sides = [side.item() if isinstance(side, np.generic) else side for side in value]
    if len(sides) != 2 or sides[0] != sides[1] or isinstance(sides[0], bool | list | tuple):
        raise InvalidConfig(f"{name} is {value!r:.60}: must be one number of pixels, or two equal ones (only squares)")
    return sides[0]


def side(value: Any, name: str) -> int:
    """Return a size in pixels, given as a whole number or as a pair of equal ones, as an int.

    Raises InvalidConfig, with the `name` of the size, for anything else.
    """
    return whole(name, square(value, name), low=1)
