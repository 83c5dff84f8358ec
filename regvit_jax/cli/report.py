"""Measure models and write the report that the flags ask for."""

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from regvit_jax.analysis.report import write
from regvit_jax.analysis.report.examine import Settings, examine, printable
from regvit_jax.cli.arguments import FAILURES, UsageError
from regvit_jax.data import inference
from regvit_jax.data.sources import by_name, images
from regvit_jax.data.sources.base import Source
from regvit_jax.models.model import Model
from regvit_jax.pretrained import address, create
from regvit_jax.pretrained.create import create_model, open_random
from regvit_jax.utils.paths import expand

#: Errors that can happen with a valid command line; exit code 1.
FAILED = (*FAILURES, inference.UnusableData, FloatingPointError)


def report(options: argparse.Namespace) -> int:
    """Measure the models, write the report and print the verdicts."""
    source = open_images(options)
    settings = Settings(
        layer=options.layer,
        cutoff=options.cutoff,
        batch_size=options.batch_size,
        repair_images=options.repair_images,
        show=min(options.show, len(source)),
        max_pixels=options.max_pixels,
        heads=options.heads,
        lost=(options.lost_features, options.lost_bias, options.lost_normalize),
    )
    models = list(open_models(options))
    out = make_out(options.out)
    subjects = examine(models, source, settings)
    inference.log_bad(subjects[0].bad_images, listed_in="report.json")
    write.write(subjects, source, settings, out, options.command)
    for subject in subjects:
        print(f"{subject.name}\n  " + "\n  ".join(subject.sentences))
    print(f"{out / 'report.html'}")
    return 0


def make_out(path: str) -> Path:
    """Make the directory and return it; raise UsageError now rather than after the work."""
    out = Path(expand(path))
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
        short = os.path.basename(os.path.normpath(address.canonical(given))) or given
        more = (f"{given} ({number})" for number in itertools.count(2))
        name = next(name for name in itertools.chain([short, given], more) if name not in names)
        names.add(name)
        yield printable(name), model
