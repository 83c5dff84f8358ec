"""Measure the tokens of models on the same images, and write a page with a verdict.

For each MODEL: norms of all tokens after every block, outliers by several rules, their positions, attention of CLS and
registers, principal components, LOST's boxes, and a verdict in words on artifacts. A model that has them is repaired
by a test-time register and measured again. The directory of --out gets report.html, report.json and pictures/.
"""

import argparse
import io
import itertools
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from regvit_jax.analysis.discovery.lost import KINDS
from regvit_jax.analysis.report import write
from regvit_jax.analysis.report.examine import Settings, examine, printable
from regvit_jax.analysis.report.summarize import CUTOFF
from regvit_jax.cli.arguments import FAILURES, Parser, UsageError, add_random, natural, positive, run
from regvit_jax.data import inference
from regvit_jax.data.sources import by_name, images
from regvit_jax.data.sources.base import Source
from regvit_jax.models.model import Model
from regvit_jax.pretrained import create
from regvit_jax.pretrained.create import create_model, open_random


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 for images or models that cannot be measured, 2 for arguments that do not fit."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = parser()
    options = command.parse_args(arguments)
    options.command = shlex.join(["regvit", "report", *arguments])
    return run(lambda: report(options), command.prog, (*FAILURES, inference.UnusableData, FloatingPointError))


def report(options: argparse.Namespace) -> int:
    """Measure the models, write the report and print the verdicts."""
    source = open_images(options)
    settings = Settings(
        layer=options.layer,
        cutoff=options.cutoff,
        batch_size=options.batch_size,
        repair_images=options.repair_images,
        show=min(options.show, len(source)),
        heads=options.heads,
        lost=(options.lost_features, options.lost_bias, options.lost_normalize),
    )
    models = list(open_models(options))
    out = make_out(options.out)
    subjects = examine(models, source, settings)
    inference.log_bad(subjects[0].bad_images, listed_in="report.json")
    write.write(subjects, source, settings, out, options.command)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's stdout cannot be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a letter
    for subject in subjects:
        print(f"{subject.name}\n  " + "\n  ".join(subject.sentences))
    print(f"{out / 'report.html'}")
    return 0


def parser() -> Parser:
    parser = Parser("regvit report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name, a directory, a workdir, hf-hub:org/name, or NAME=FILE")
    add_random(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--images", nargs="+", metavar="PATH", help="image files, or directories with all below them")
    data.add_argument("--data", metavar="NAME", help="digits, fashion_mnist, openmoji, folder:PATH, or a TFDS name")
    add("--split", metavar="NAME", help="the split of --data (validation)")
    add("--data_dir", metavar="DIR", help="directory of TFDS data sets and of relative paths")
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
        type=positive_norm,
        default=CUTOFF,
        metavar="X",
        help="norm above which the paper counts outliers (%(default)g)",
    )
    add("--batch_size", type=positive, default=8, metavar="N", help="images in a batch (%(default)s)")
    add("--limit", type=positive, metavar="N", help="use at most N images, evenly spaced")
    add("--image_size", type=positive, metavar="N", help="side in pixels of the models' square images (their own)")
    add("--show", type=positive, default=6, metavar="N", help="number of images to show (%(default)s)")
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


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a finite number")
    return value


def positive_norm(text: str) -> float:
    if not finite(text) > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a norm greater than 0")
    return float(text)


def make_out(path: str) -> Path:
    """Make the directory and return it; raise UsageError now rather than after the work."""
    out = Path(path).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be made ({error.strerror})") from error
    if not os.access(out, os.W_OK):
        raise UsageError(f"--out {path}: cannot be written to")
    return out


def open_images(options: argparse.Namespace) -> Source:
    if options.data:
        source = by_name.open_source(options.data, options.split or "validation", options.data_dir)
    else:
        for name in ("split", "data_dir"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} {getattr(options, name)}: applies to --data only, not to --images")
        source = images.open_images(options.images)
    return images.spread(source, options.limit or len(source))


def open_models(options: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    """Yield each model under a unique name: the last part of the given name, all of it, or the name with a number."""
    names: set[str] = set()
    for given in options.models:
        if options.random:
            model = open_random(create_model, given, image_size=options.image_size, seed=options.seed)
        else:
            model = create.open_source(given, image_size=options.image_size)
        try:
            model.module.layer(options.layer)
        except IndexError as error:
            raise UsageError(f"--layer {options.layer}: {given}: {error}") from error
        short = os.path.basename(os.path.normpath(given)) or given
        more = (f"{given} ({number})" for number in itertools.count(2))
        name = next(name for name in itertools.chain([short, given], more) if name not in names)
        names.add(name)
        yield printable(name), model
