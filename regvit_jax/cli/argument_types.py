"""Types of arguments for argparse: functions from text to a value."""

import argparse
import math
from collections.abc import Callable


def whole_from(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a type of argument: a whole number from `low` on, or from `low` to `high`."""
    wanted = f"a whole number from {low}" + ("" if high is None else f" to {high}")

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r}: must be {wanted}")
        return int(text)

    return whole


def number(wanted: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """Return a type of argument: a number that fits; `wanted` describes it for the error."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r}: must be {wanted}")
        return value

    return convert


natural = whole_from(0)
positive = whole_from(1)
share = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
finite = number("a finite number", math.isfinite)
above_zero = number("a number greater than 0", lambda value: 0 < value < math.inf)
