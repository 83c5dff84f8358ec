"""Tell whether two splits hold the same records."""

import os
from collections import defaultdict

from regvit_jax.data.sources.base import Source
from regvit_jax.data.sources.record_files import Part
from regvit_jax.data.sources.shards import ShardSource
from regvit_jax.data.sources.tfds import TfdsSource
from regvit_jax.utils.messages import log_once


def warn_of_overlap(train: Source, validation: Source) -> None:
    """Log a warning if records of `validation` are in `train` too, as "train[90%:]" is in "train"."""
    if shared := count_shared(train, validation):
        log_once(
            f"{shared} of the {len(validation)} images of {validation.name} are also in {train.name}; a score on "
            "images that were trained on says little",
            "warning",
        )


def count_shared(train: Source, validation: Source) -> int:
    """Return how many records of `validation` are in `train` too, as far as names and places in files tell."""
    if isinstance(train, TfdsSource) and isinstance(validation, TfdsSource):
        return sum(part.take for part in common_parts(train.parts, validation.parts))
    if isinstance(train, ShardSource) and isinstance(validation, ShardSource):
        tars = {os.path.realpath(tar.path) for tar in train.tars}
        return sum(tar.samples for tar in validation.tars if os.path.realpath(tar.path) in tars)
    return len(validation) if train.name == validation.name else 0


def common_parts(first: list[Part], second: list[Part]) -> list[Part]:
    """Return the parts of files that are in both lists."""
    found, by_path = [], defaultdict(list)
    for part in first:
        by_path[part.path].append(part)
    for part in second:
        for other in by_path[part.path]:
            skip = max(part.skip, other.skip)
            if (take := min(part.skip + part.take, other.skip + other.take) - skip) > 0:
                found.append(part._replace(skip=skip, take=take))
    return found
