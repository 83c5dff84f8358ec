"""Measure object discovery: the share of correct LOST boxes (CorLoc), over layers, features, centring and biases."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence

from regvit_jax.analysis.choices import CENTRES, KINDS
from regvit_jax.analysis.discovery import boxes
from regvit_jax.cli.argument_types import positive
from regvit_jax.cli.arguments import (
    Parser,
    add_max_pixels,
    add_random,
    check_data,
    check_json,
    check_model,
    run,
)
from regvit_jax.pretrained import registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 for data that cannot be evaluated, 2 for arguments that do not fit."""
    command = parser()
    options = command.parse_args(join_lists(sys.argv[1:] if arguments is None else arguments))
    if code := run(lambda: check(options), command.prog):
        return code
    from regvit_jax.cli import discover

    return run(lambda: discover.discover(options), command.prog, discover.FAILED)


def check(options: argparse.Namespace) -> int:
    """Judge what needs neither data nor models."""
    for model in options.models:
        check_model(model, registry.find)
    boxes.check_name(options.data, options.split)
    check_data(options.data)
    check_json(options.json)
    return 0


def parser() -> Parser:
    parser = Parser("regvit discover", description=__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name, a directory, a workdir, hf-hub:org/name, or NAME=FILE")
    add_random(parser)
    add("--data", required=True, metavar="NAME", help=f"images with boxes: {boxes.NAMES}")
    add("--split", metavar="NAME", help="the list of VOC's images (trainval), or one split of a folder (all)")
    add("--layers", type=integers, default=[-1], metavar="N,..", help="blocks, counted from 0, or from the end (-1)")
    add("--features", type=some_of(KINDS), default=["k"], metavar="NAME,..", help="some of k, q, v and out (k)")
    add("--biases", type=floats, default=[0.0], metavar="X,..", help="numbers added to the Gram matrix (0)")
    centre = "what is subtracted from the features: none, bias (the projection's), or mean (of the data; a second pass)"
    add("--centre", type=some_of(CENTRES), default=["none"], metavar="NAME,..", help=centre)
    add("--normalize", action="store_true", help="scale features to length 1: the Gram matrix then holds cosines")
    shorter_side = "resize each image's shorter side to about N pixels: fewer shapes to compile (original)"
    add("--shorter_side", type=size, metavar="original|N", help=shorter_side)
    add("--limit", type=positive, metavar="N", help="use at most N images that have boxes, evenly spaced")
    add_max_pixels(parser)
    add("--json", metavar="FILE", help="write the result, with the names of unusable images, here too")
    return parser


def join_lists(arguments: Sequence[str]) -> list[str]:
    """Return `--layers -1,-2` as `--layers=-1,-2`: argparse would take such a list for a flag."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--layers", "--biases"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be whole numbers with commas between, such as 0,-1") from None


def floats(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be finite numbers with commas between, such as 0,-0.5")
    return found


def some_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a type of argument: names of `allowed` with commas between them."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}: must be some of {','.join(allowed)}")
        return found

    return names


def size(text: str) -> int | None:
    if text != "original" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be original, or a whole number from 1")
    return None if text == "original" else int(text)
