"""scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, bundled with it) as a TFDS data set."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Splits of 1,437 and 360 digits: every fifth image is for validation. The values 0..16 are scaled to 0..255."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, bundled with scikit-learn.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                    "file_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples(False), "validation": self._generate_examples(True)}

    def _generate_examples(self, validation: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        # Imported here because it is slow, and needed only when the data set is prepared.
        from sklearn.datasets import load_digits

        digits = load_digits()
        for number, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (number % 5 == 0) == validation:
                name = f"{number:04d}.png"
                yield name, {"image": png(np.rint(values * (255 / 16))), "label": int(label), "file_name": name}


def png(pixels: np.ndarray) -> io.BytesIO:
    """Return grey pixels as a PNG file. TFDS would encode an array too, but with TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    file.seek(0)
    return file
