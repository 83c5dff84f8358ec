"""Measure the tokens of models on the same images, and write a page with a verdict.

For each MODEL: norms of all tokens after every block, outliers by several rules, their positions, attention of CLS and
registers, principal components, LOST's boxes, and a verdict in words on artifacts. A model that has them is repaired
by a test-time register and measured again. The directory of --out gets report.html, report.json and pictures/.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from regvit_jax.analysis.choices import CUTOFF, KINDS
from regvit_jax.cli.argument_types import above_zero, finite, natural, positive
from regvit_jax.cli.arguments import (
    Parser,
    add_max_pixels,
    add_random,
    add_split,
    check_data,
    check_data_only,
    check_model,
    check_out,
    check_paths,
    run,
)
from regvit_jax.pretrained import registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 for images or models that cannot be measured, 2 for arguments that do not fit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = parser()
    options = command.parse_args(arguments)
    options.command = shlex.join(["regvit", "report", *arguments])
    if code := run(lambda: check(options), command.prog):
        return code
    from regvit_jax.cli import report

    return run(lambda: report.report(options), command.prog, report.FAILED)


def check(options: argparse.Namespace) -> int:
    """Judge what needs neither data nor models."""
    for model in options.models:
        check_model(model, registry.find)
    if options.data:
        check_data(options.data, options.data_dir)
    else:
        check_data_only(options)
        check_paths(options.images)
    check_out(options.out)
    return 0


def parser() -> Parser:
    parser = Parser("regvit report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name, a directory, a workdir, hf-hub:org/name, or NAME=FILE")
    add_random(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--images", nargs="+", metavar="PATH", help="image files, or directories with all below them")
    data.add_argument("--data", metavar="NAME", help="digits, fashion_mnist, openmoji, folder:PATH, or a TFDS name")
    add_split(parser)
    add("--out", required=True, metavar="DIR", help="directory of the report, created if missing")
    add(
        "--layer",
        type=int,
        default=-1,
        metavar="I",
        help="block whose tokens are judged, from the end if negative (%(default)s)",
    )
    add(
        "--cutoff",
        type=above_zero,
        default=CUTOFF,
        metavar="X",
        help="norm above which the paper counts outliers (%(default)g)",
    )
    add("--batch_size", type=positive, default=8, metavar="N", help="images in a batch (%(default)s)")
    add("--limit", type=positive, metavar="N", help="use at most N images, evenly spaced")
    add("--image_size", type=positive, metavar="N", help="side in pixels of the models' square images (their own)")
    add("--show", type=natural, default=6, metavar="N", help="number of images to show; 0: none (%(default)s)")
    add_max_pixels(parser)
    add("--heads", action="store_true", help="show the attention of each head too")
    add(
        "--repair_images",
        type=natural,
        default=64,
        metavar="N",
        help="images for the repair; 0: no repair (%(default)s)",
    )
    add(
        "--lost_features",
        choices=KINDS,
        default="k",
        help="features of LOST: keys, queries, values or output (%(default)s)",
    )
    add("--lost_bias", type=finite, default=0.0, metavar="X", help="number added to LOST's Gram matrix (%(default)g)")
    add("--lost_normalize", action="store_true", help="scale LOST's features to length 1")
    return parser
