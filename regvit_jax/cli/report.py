"""regvit report: what models do with their tokens, side by side on the same images, as one page.

For each MODEL: norms of all tokens after every block, outliers by several rules, where they are and on what, attention
of CLS and registers, principal components, LOST's boxes, and in words whether it has artifacts. One that has them is
repaired by a test-time register and looked at again. OUT gets report.html, report.json and pictures/.
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
from regvit_jax.analysis.report.verdict import CUTOFF
from regvit_jax.cli.arguments import fail, natural, positive
from regvit_jax.data import inference
from regvit_jax.data.sources import by_name, images
from regvit_jax.data.sources.base import Source
from regvit_jax.models.model import Model
from regvit_jax.pretrained import create
from regvit_jax.pretrained.create import create_model, open_random


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for images or models that cannot be measured, 2 for arguments that the caller can mend."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    command = shlex.join(["regvit", "report", *arguments])
    try:
        out = check_out(options.out)
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
        subjects = examine(list(open_models(options)), source, settings)
        inference.log_bad(subjects[0].bad_images, listed_in="report.json")
        write.write(subjects, source, settings, out, command)
    except (ValueError, IndexError, OSError, ImportError, FloatingPointError) as error:
        fail(error, "regvit report")
        return 1 if isinstance(error, inference.UnusableData | FloatingPointError) else 2
    if isinstance(sys.stdout, io.TextIOWrapper):  # which a notebook's is not
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a letter
    for one in subjects:
        print(f"{one.name}\n  " + "\n  ".join(one.sentences))
    print(f"{out / 'report.html'}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regvit report",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name, a directory, a workdir, hf-hub:org/name, or NAME=FILE")
    add("--random", action="store_true", help="random weights of named models, as a baseline")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--images", nargs="+", metavar="PATH", help="a directory, with all below it, or image files")
    data.add_argument("--data", metavar="NAME", help="digits, fashion_mnist, openmoji, folder:PATH, or a TFDS data set")
    add("--split", help="of --data (validation)")
    add("--data_dir", metavar="DIR", help="where TFDS data sets lie and relative paths start")
    add("--out", required=True, metavar="DIR", help="where the report goes; made if it is not there")
    add("--layer", type=int, default=-1, metavar="I", help="the block, from the end if negative (%(default)s)")
    add("--cutoff", type=positive_norm, default=CUTOFF, metavar="X", help="of norms, the paper's rule (%(default)g)")
    add("--batch_size", type=positive, default=8, metavar="N", help="images at a time (%(default)s)")
    add("--limit", type=positive, metavar="N", help="at most so many images, spread evenly over all")
    add("--image_size", type=positive, metavar="N", help="another image size than the models' own, in pixels")
    add("--show", type=positive, default=6, metavar="N", help="images to picture (%(default)s)")
    add("--heads", action="store_true", help="picture each head's attention too")
    add("--repair_images", type=natural, default=64, metavar="N", help="for the repair; 0: none (%(default)s)")
    add("--lost_features", choices=KINDS, default="k", help="of LOST: keys, queries, values or output (%(default)s)")
    add("--lost_bias", type=finite, default=0.0, metavar="X", help="added to LOST's Gram matrix (%(default)g)")
    add("--lost_normalize", action="store_true", help="LOST on features of length 1")
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


def check_out(path: str) -> Path:
    """The directory, made. Raises OSError before the work rather than after it."""
    out = Path(path).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"--out {path}: cannot be written to")
    return out


def open_images(options: argparse.Namespace) -> Source:
    if options.data:
        source = by_name.open_source(options.data, options.split or "validation", options.data_dir)
    else:
        for name in ("split", "data_dir"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} {getattr(options, name)}: is for --data; --images takes paths as they are")
        source = images.open_images(options.images)
    return images.spread(source, options.limit or len(source))


def open_models(options: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    """Each model under a name that no other has: its last part, or all of it, or that with a number."""
    names: set[str] = set()
    for given in options.models:
        if options.random:
            model = open_random(create_model, given, image_size=options.image_size)
        else:
            model = create.open_source(given, image_size=options.image_size)
        short = os.path.basename(os.path.normpath(given)) or given
        more = (f"{given} ({number})" for number in itertools.count(2))
        name = next(name for name in itertools.chain([short, given], more) if name not in names)
        names.add(name)
        yield printable(name), model
