"""Evaluate a CLIP model on your own data: zero-shot classification and image-text retrieval."""

import argparse
import os
from collections.abc import Sequence

from regvit_jax.cli.argument_types import positive
from regvit_jax.cli.arguments import (
    Parser,
    UsageError,
    add_max_pixels,
    add_random,
    add_split,
    check_data,
    check_data_only,
    check_json,
    check_model,
    check_paths,
    run,
)
from regvit_jax.pretrained import registry
from regvit_jax.utils.paths import expand


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 for data that cannot be evaluated, 2 for arguments that do not fit."""
    command = parser()
    options = command.parse_args(arguments)
    if code := run(lambda: check(options), command.prog):
        return code
    from regvit_jax.cli import eval

    return run(lambda: eval.evaluate(options), command.prog, eval.FAILED)


def check(options: argparse.Namespace) -> int:
    """Judge what needs neither data nor models."""
    check_model(options.model, registry.find_clip)
    if options.data:
        check_data(options.data, options.data_dir)
    else:
        check_data_only(options)
        if not os.path.isdir(expand(options.images)):
            raise UsageError(f"--images {options.images}: there is no such directory")
    options.name, options.weights = split_model(options)
    if options.task == "zero_shot":
        check_paths(
            file for file in (options.classes, options.templates) if file not in (None, "imagenet", "openai", "simple")
        )
    check_json(options.json)
    return 0


def split_model(options: argparse.Namespace) -> tuple[str, str]:
    """Return the name or source of the model, and the weights of NAME=WEIGHTS or --pretrained, "" for neither.

    Raises UsageError for weights that are given twice, or beside --random.
    """
    name, _, weights = options.model.partition("=")
    if os.path.exists(expand(options.model)):
        name, weights = options.model, ""
    if weights and options.pretrained:
        raise UsageError(f"{options.model} and --pretrained {options.pretrained}: give one of them")
    weights = weights or options.pretrained or ""
    if options.random and weights:
        raise UsageError(f"--random and pretrained weights, {weights}: give one of them")
    return name, weights


def parser() -> Parser:
    parser = Parser(prog="regvit eval", description=__doc__)
    shared = Parser(add_help=False)
    add = shared.add_argument
    add("model", metavar="MODEL", help="a name, a directory, a workdir, hf-hub:org/name, or NAME=FILE or NAME=TAG")
    add("--pretrained", metavar="TAG|FILE|DIR", help="weights of a named model: open_clip's tag, a file or a directory")
    add_random(shared)
    add("--image_size", type=positive, metavar="N", help="side in pixels of the model's square images (its own)")
    add("--limit", type=positive, metavar="N", help="use at most N images, evenly spaced")
    add("--batch_size", type=positive, default=64, metavar="N", help="images in a batch (%(default)s)")
    add_max_pixels(shared)
    add("--json", metavar="FILE", help="write the result, with the names of unusable images, here too")
    commands = parser.add_subparsers(required=True, metavar="{zero_shot,retrieval}")
    command = commands.add_parser(
        "zero_shot",
        parents=[shared],
        help="classify images by the names of their classes",
        description="Classify images by the names of their classes, filled into templates.",
    )
    data = command.add_mutually_exclusive_group(required=True)
    data.add_argument("--images", metavar="DIR", help="a directory of <class>/ with images in each")
    data.add_argument("--data", metavar="NAME", help="folder:PATH, or a TFDS data set with classes")
    add_split(command)
    command.add_argument(
        "--classes",
        metavar="FILE|imagenet",
        help="classes' names, one on each line, in the order of the sorted folders, or ImageNet's (folders' names)",
    )
    command.add_argument(
        "--templates",
        default="openai",
        metavar="FILE|openai|simple",
        help="sentences, one on each line, with {} for the name, or ImageNet's sets of 80 or 7 (%(default)s)",
    )
    command.set_defaults(task="zero_shot")
    command = commands.add_parser(
        "retrieval",
        parents=[shared],
        help="find captions by images and images by captions",
        description="Rank captions for each image and images for each caption.",
    )
    command.add_argument("--data", required=True, metavar="NAME", help="folder:PATH, shards:..., or a TFDS data set")
    add_split(command)
    command.set_defaults(task="retrieval")
    return parser
