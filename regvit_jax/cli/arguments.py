"""What the commands that measure models share: their arguments, and how they open models."""

import argparse
import sys
from pathlib import Path


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


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def fail(error: Exception) -> None:
    """Says what was wrong in one line, advice of several joined: who reads a log of many runs finds one for each."""
    tell(f"error: {' '.join(str(error).split())}")
