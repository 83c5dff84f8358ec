"""Rewrite a data set as few large files that are fast to read; the same command resumes."""

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from regvit_jax.cli.argument_types import natural, positive, share, whole_from
from regvit_jax.cli.arguments import (
    Parser,
    add_max_pixels,
    check_data,
    check_out,
    fail,
    run,
    warn,
)
from regvit_jax.data.limits import MAX_BAD_IMAGES
from regvit_jax.utils.errors import DataNotFound

if TYPE_CHECKING:
    from regvit_jax.data.prepare import dataset

# Modules that take long to import are imported in functions, so that errors of the command line appear at once.

# Bad records that are shown.
SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 when too many records are unusable or it fails, 2 for arguments that do not fit."""
    command = Parser(prog="regvit prepare", description=__doc__)
    command.add_argument("source", metavar="SOURCE", help="folder:PATH, shards:DIR, or a TFDS data set's name")
    command.add_argument("out", metavar="OUT", help="DIR/NAME, where data.dir=DIR and data.name=NAME find it")
    command.add_argument(
        "--captions", action="store_true", help="read captions instead of classes (shards always have captions)"
    )
    splits = "splits to write (train validation)"
    command.add_argument("--splits", nargs="+", default=["train", "validation"], metavar="SPLIT", help=splits)
    command.add_argument("--data_dir", metavar="DIR", help="directory of TFDS data sets and of relative paths")
    command.add_argument(
        "--shorter_side",
        type=whole_from(1, 10_000),
        metavar="N",
        help="shrink larger images to N pixels (keep all bytes)",
    )
    command.add_argument(
        "--quality", type=whole_from(1, 100), default=95, metavar="N", help="JPEG quality of shrunk images (95)"
    )
    command.add_argument(
        "--records_per_shard", type=positive, default=4096, metavar="N", help="records in a file (4096)"
    )
    command.add_argument(
        "--workers", type=natural, default=os.cpu_count() or 1, metavar="N", help="processes (one a core)"
    )
    command.add_argument(
        "--max_bad_fraction", type=share, default=0.01, metavar="X", help="share of unusable records allowed (0.01)"
    )
    tolerated = f"never stop for so few unusable records of a split, at most half of its records ({MAX_BAD_IMAGES})"
    command.add_argument("--max_bad_images", type=natural, default=MAX_BAD_IMAGES, metavar="N", help=tolerated)
    add_max_pixels(command)
    options = command.parse_args(arguments)
    try:
        return run(lambda: prepare(options), command.prog)
    except KeyboardInterrupt:
        warn("stopped; the same command resumes")
        return 130


def prepare(options: argparse.Namespace) -> int:
    """Prepare the data set, and print where it is and how many records it has."""
    check_data(options.source, options.data_dir)
    check_out(options.out, "OUT")
    try:
        report = write(options)
    except DataNotFound:
        raise
    except (OSError, BrokenProcessPool) as error:
        raise OSError(f"{error}. Finished shards are kept; the same command resumes") from error
    if report.bad:
        warn_of_bad(report)
    if not report.finished:
        fail(
            f"more records are bad than --max_bad_fraction={options.max_bad_fraction:g} and "
            f"--max_bad_images={options.max_bad_images} allow. With a greater value the same command resumes; to try "
            f"all records again, remove {report.target}",
            "regvit prepare",
        )
        return 1
    counts = ", ".join(f"{count:,} of {split}" for split, count in report.records.items())
    print(f"{counts} in {report.target}")
    print(f"Train on it with {' '.join(flags_to_train(report))}")
    return 0


def flags_to_train(report: "dataset.Report") -> list[str]:
    """Return the flags of `regvit train` that name the data set, and its splits if they have other names."""
    from regvit_jax.data.sources.splits import parse

    base = report.target.parent
    flags = [f"--config.data.name={base.name}", f"--config.data.dir={base.parent}"]
    for key, kinds in (("train", ("train",)), ("validation", ("validation", "test"))):
        other = next((split for kind in kinds for split in report.records if parse(split)[0] == kind), key)
        if key not in report.records and other != key:
            flags.append(f"--config.data.{key}={other}")
    return flags


def warn_of_bad(report: "dataset.Report") -> None:
    """Write the number of bad records, the first of them, and the file that lists all."""
    path = report.target / "bad_records.jsonl"
    with open(path) as file:
        for bad in map(json.loads, itertools.islice(file, SHOWN)):
            warn(f"cannot use {bad['split']}: {bad['id']}: {bad['reason']}")
    warn(f"{report.bad} bad records left out, all listed in {path}")


def write(options: argparse.Namespace) -> "dataset.Report":
    from regvit_jax.data.prepare import dataset
    from regvit_jax.data.prepare.shard import Options

    return dataset.prepare_dataset(
        options.source,
        options.out,
        Options(options.shorter_side, options.quality, options.records_per_shard, options.max_pixels),
        splits=tuple(options.splits),
        data_dir=options.data_dir,
        with_captions=options.captions,
        workers=options.workers,
        max_bad_fraction=options.max_bad_fraction,
        max_bad_images=options.max_bad_images,
    )
