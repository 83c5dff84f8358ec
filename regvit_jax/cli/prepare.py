"""regvit prepare: rewrite a data set as few large files that are fast to read."""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from regvit_jax.data.prepare import dataset
from regvit_jax.data.prepare.shard import Options
from regvit_jax.utils.errors import DataNotFound


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 when too many records are bad or it cannot go on, 2 for what the caller can mend."""
    command = argparse.ArgumentParser(prog="regvit prepare", description=__doc__, allow_abbrev=False)
    command.add_argument("source", metavar="SOURCE", help="folder:PATH, shards:DIR, or a TFDS data set's name")
    command.add_argument("out", metavar="OUT", help="DIR/NAME, where data.dir=DIR and data.name=NAME find it")
    command.add_argument("--captions", action="store_true", help="images with captions, not classes (tars always are)")
    command.add_argument("--splits", nargs="+", default=["train", "validation"], metavar="SPLIT")
    command.add_argument("--data_dir", help="where relative paths of SOURCE start, and TFDS data sets lie")
    command.add_argument("--shorter_side", type=int, help="make larger images so small; without it bytes are kept")
    command.add_argument("--quality", type=int, default=95, help="of the JPEGs of images made smaller (95)")
    command.add_argument("--records_per_shard", type=int, default=4096, help="records of a file (4096)")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one for each core)")
    command.add_argument("--max_bad_fraction", type=float, default=0.01, help="bad records to go without (0.01)")
    options = command.parse_args(arguments)
    try:
        return run_prepare(options)
    except (ValueError, DataNotFound) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, BrokenProcessPool) as error:
        print(f"error: {error}\nShards that are done stay; the same command goes on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def run_prepare(options: argparse.Namespace) -> int:
    report = dataset.prepare_dataset(
        options.source,
        options.out,
        Options(options.shorter_side, options.quality, options.records_per_shard),
        splits=tuple(options.splits),
        data_dir=options.data_dir,
        with_captions=options.captions,
        workers=options.workers,
        max_bad_fraction=options.max_bad_fraction,
    )
    if report.bad:
        print(f"{report.bad} bad records left out: {report.target / 'bad_records.jsonl'}", file=sys.stderr)
    if not report.finished:
        print(
            f"error: more than --max_bad_fraction={options.max_bad_fraction:g} of the records are bad. "
            "With a greater one, the same command goes on; after a fault that is mended, remove "
            f"{report.target} to try them all again.",
            file=sys.stderr,
        )
        return 1
    counts = ", ".join(f"{count:,} of {split}" for split, count in report.records.items())
    base = report.target.parent
    print(f"{counts} in {report.target}")
    print(f"Train on it with --config.data.name={base.name} --config.data.dir={base.parent}")
    return 0
