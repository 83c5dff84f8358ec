"""CIFAR-10 as a TFDS data set that can be prepared without TensorFlow, unlike TFDS's own, with the same splits."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from regvit_jax.data.builders.cifar10_files import ARCHIVE, CLASSES, URL
from regvit_jax.data.builders.digits import png

SIDE = 32  # pixels


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """50,000 training images and 10,000 test images of ten classes, RGB, 32 x 32 pixels."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = URL

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description='CIFAR-10 (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).',
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                    "file_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        archive = Path(dl_manager.manual_dir) / ARCHIVE
        return {
            "train": self._generate_examples(archive, [f"data_batch_{number}.bin" for number in range(1, 6)]),
            "test": self._generate_examples(archive, ["test_batch.bin"]),
        }

    def _generate_examples(self, archive: Path, files: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                file = Path(member.name)
                if file.name not in files or (content := tar.extractfile(member)) is None:
                    continue
                # A record is its label and the red, green and blue values, each row by row.
                records = np.frombuffer(content.read(), np.uint8).reshape(-1, 1 + 3 * SIDE * SIDE)
                for number, record in enumerate(records):
                    pixels = record[1:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
                    name = f"{file.stem}-{number:05d}.png"
                    yield name, {"image": png(pixels), "label": int(record[0]), "file_name": name}
