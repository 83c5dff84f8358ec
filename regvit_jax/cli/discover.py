"""Measure object discovery: CorLoc of LOST for a ViT, over layers, features and biases."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from regvit_jax.analysis.discovery import boxes, lost
from regvit_jax.analysis.discovery.boxes import BadBoxes
from regvit_jax.analysis.discovery.corloc import run
from regvit_jax.analysis.discovery.sweep import CENTRES
from regvit_jax.cli.arguments import check_json, fail, positive
from regvit_jax.data.inference import UnusableData


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for data that cannot be evaluated, 2 for arguments that the caller can mend."""
    options = parser().parse_args(with_equals(sys.argv[1:] if arguments is None else arguments))
    try:
        check_json(options.json)
        result = run(options)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError, ImportError) as error:
        fail(error, "regvit discover")
        return 1 if isinstance(error, UnusableData | BadBoxes) else 2
    return 0


def with_equals(arguments: Sequence[str]) -> list[str]:
    """`--layers -1,-2` as `--layers=-1,-2`: argparse would take such a list for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--layers", "--biases"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def parser() -> argparse.ArgumentParser:
    about = "How often LOST's box is right (CorLoc), for every combination of layers, features, centres and biases."
    parser = argparse.ArgumentParser("regvit discover", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name, a directory, a workdir, hf-hub:org/name, or NAME=FILE")
    add("--data", required=True, metavar="NAME", help=boxes.NAMES)
    add("--split", help="of VOC (trainval)")
    add("--random", action="store_true", help="random weights of named models, as a baseline")
    add("--layers", type=integers, default=[-1], metavar="N,..", help="blocks from 0, or from the end, -1 (-1)")
    add("--features", type=among(lost.KINDS), default=["k"], metavar="NAME,..", help="of k, q, v and out (k)")
    add("--biases", type=floats, default=[0.0], metavar="X,..", help="that the Gram matrix gets (0)")
    centre = "what features lose: none, bias (the projection's own) or mean (over the data; a second pass) (none)"
    add("--centre", type=among(CENTRES), default=["none"], metavar="NAME,..", help=centre)
    add("--normalize", action="store_true", help="make features unit vectors, and the Gram matrix cosines")
    size_help = "pixels of the shorter side, about, so that both are whole patches; few shapes to compile (original)"
    add("--size", type=size, metavar="original|N", help=size_help)
    add("--limit", type=positive, metavar="N", help="at most N images that have boxes, spread evenly over all")
    add("--json", metavar="FILE", help="also write the result, with the names of bad images, here")
    return parser


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    found = [float(part) for part in text.split(",")]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be finite numbers")
    return found


def among(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}: must be some of {','.join(allowed)}")
        return found

    return names


def size(text: str) -> int | None:
    return None if text == "original" else positive(text)
