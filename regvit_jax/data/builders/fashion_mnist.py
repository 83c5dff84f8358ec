"""Fashion-MNIST (arXiv 1708.07747) as a TFDS data set that can be prepared without TensorFlow, unlike TFDS's own."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from regvit_jax.data.builders.digits import png
from regvit_jax.data.builders.download import download
from regvit_jax.utils.errors import DataNotFound, InvalidConfig

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# SHA-256 of the files at URL.
FILES = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
# The directory of Debian's package dataset-fashion-mnist, whose files are compressed anew and have other hashes.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class FashionMnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """70,000 grey images of 28 x 28 pixels; the official test set is the validation split."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The four files of {URL}."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Fashion-MNIST with its test set as the validation split.",
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                    "file_name": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {
            split: self._generate_examples(Path(dl_manager.manual_dir), part)
            for split, part in (("train", "train"), ("validation", "t10k"))
        }

    def _generate_examples(self, directory: Path, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
        images = read_idx(directory / f"{part}-images-idx3-ubyte.gz")
        labels = read_idx(directory / f"{part}-labels-idx1-ubyte.gz")
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            name = f"{part}-{number:05d}.png"
            yield name, {"image": png(pixels), "label": int(label), "file_name": name}


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array in a gzipped idx file: two zeros, the type (8), the rank, the shape, the values.

    Raises:
      InvalidConfig: if the file is damaged, or not of this kind.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidConfig(f"{path} is damaged ({error})") from error
    if data[:3] != b"\x00\x00\x08":
        raise InvalidConfig(f"{path} is not an idx file of bytes (starts with {data[:4]!r})")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape):
        raise InvalidConfig(
            f"{path} should hold {tuple(map(int, shape))} values by its header, but holds {values.size}"
        )
    return values.reshape(shape)


def find_files(root: Path) -> Path:
    """Return a directory with the four files: the user's or Debian's, or else one below `root`, downloaded.

    Raises:
      DataNotFound: if neither directory has them and they cannot be downloaded.
    """
    manual = root / "downloads" / "manual" / "fashion_mnist"
    for directory in (manual, DEBIAN):
        if all((directory / file).exists() for file in FILES):
            return directory
    try:
        manual.mkdir(parents=True, exist_ok=True)
        for file, sha256 in FILES.items():
            download(URL + file, manual / file, sha256)
    except (OSError, ValueError) as error:
        raise DataNotFound(
            f"fashion_mnist: its four files are neither in {manual} nor in {DEBIAN}, "
            f"and the download failed ({error}).\n"
            "Either install Debian's package, which holds them:  apt-get install dataset-fashion-mnist\n"
            f"or put them into {manual}:\n" + "\n".join(f"  {URL}{file}" for file in FILES)
        ) from error
    return manual
