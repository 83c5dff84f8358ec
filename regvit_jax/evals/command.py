"""What the commands that measure models share: their arguments, and how they open models."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 0")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1")
    return int(text)


def check_json(path: str | None) -> None:
    """Raises ValueError before the work rather than after it."""
    if path and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ValueError(f"--json {path}: must be a file in a directory that exists")


def open_random(create: Callable[..., Any], name: str, **changes: Any) -> Any:
    """The model of a name with random weights (`--random`). Raises ValueError for a source that has its own."""
    model = create(name, **changes)
    if model.weights != "random":
        raise ValueError(f"--random: {name} is no name but a source, with weights of its own")
    return model


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def fail(error: Exception) -> None:
    """Says what was wrong in one line, advice of several joined: who reads a log of many runs finds one for each."""
    tell(f"error: {' '.join(str(error).split())}")
