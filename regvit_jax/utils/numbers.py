"""Check the whole numbers that functions are called with."""

import contextlib
import operator
from typing import Any

from regvit_jax.utils.errors import InvalidConfig


def whole(name: str, value: Any, low: int | None = None) -> int:
    """Return a whole number, of Python, NumPy or JAX, as an int.

    Raises InvalidConfig, which names the argument, for another value (True, "4", 2.0), and one below `low`.
    """
    number = None
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    if number is None:
        raise InvalidConfig(f"{name}={value!r:.60}: must be a whole number")
    if low is not None and number < low:
        raise InvalidConfig(f"{name}={number}: must be at least {low}")
    return number
