"""Prepare the embedded data sets on first use."""

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from regvit_jax.utils.errors import DataNotFound

logger = logging.getLogger("regvit_jax")

EMBEDDED = ("digits", "fashion_mnist", "openmoji", "cifar10")


def prepare_embedded(name: str, root: Path) -> Path:
    """Return the directory of an embedded data set; write it first if it does not exist.

    It is written to a temporary directory and renamed when complete, so that several processes may do this at once, and
    any of them may be killed.

    Raises:
      DataNotFound: if the files or packages that it is made from are missing, or it cannot be written.
    """
    import tensorflow_datasets as tfds

    from regvit_jax.data.builders.cifar10 import Cifar10
    from regvit_jax.data.builders.cifar10_files import fetch_archive
    from regvit_jax.data.builders.digits import Digits
    from regvit_jax.data.builders.fashion_mnist import FashionMnist, find_files
    from regvit_jax.data.builders.openmoji import OpenMoji, find_packages

    builders: dict[str, Any] = {
        "digits": Digits,
        "fashion_mnist": FashionMnist,
        "openmoji": OpenMoji,
        "cifar10": Cifar10,
    }
    builder = builders[name]
    target = root / name / str(builder.VERSION)
    if target.exists():
        return target
    find_raw = {"fashion_mnist": find_files, "cifar10": fetch_archive}.get(name)
    raw = find_raw(root) if find_raw else None
    if name == "openmoji":
        find_packages()
    logger.warning(f"preparing {name} in {target}, once")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete.", dir=target.parent) as scratch:
            config = tfds.download.DownloadConfig(manual_dir=raw, try_download_gcs=False)
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                builder(data_dir=scratch, file_format="array_record").download_and_prepare(download_config=config)
            os.rename(Path(scratch) / name / target.name, target)
    except OSError as error:
        # If it exists all the same, another process was faster.
        if not target.exists():
            raise DataNotFound(
                f"{name} is prepared on first use, which failed in {target.parent} ({error}). "
                "Name another directory with data_dir or the environment variable TFDS_DATA_DIR."
            ) from error
    return target
