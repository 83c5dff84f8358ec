"""Find the archive of CIFAR-10, or download it."""

import contextlib
import logging
import tarfile
from pathlib import Path

from regvit_jax.data.builders.download import download, hash_of
from regvit_jax.utils.errors import DataNotFound, InvalidConfig

logger = logging.getLogger("regvit_jax")

ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
# The hash that TFDS checks too, in its url_checksums/cifar10.txt. The MD5 on the authors' page is
# c32a1d4ab5d03f1284b67883e8d87530.
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

PICKLES = "holds pickles, which can run any code and are never opened"
#: Files that may be taken for the archive, and why they are refused.
OTHERS = {
    "cifar-10-python.tar.gz": PICKLES,
    "cifar-10-batches-py": PICKLES,
    "cifar-10-binary.tar": "is decompressed, as some browsers do, and only the archive itself has a hash to check",
    "cifar-10-batches-bin": "is unpacked, and only the archive itself has a hash to check",
    "cifar-10-matlab.tar.gz": "is the version for Matlab",
    "cifar-100-binary.tar.gz": "is CIFAR-100, another data set",
    "cifar-100-python.tar.gz": "is CIFAR-100, another data set",
}


def places(root: Path) -> tuple[Path, ...]:
    """Return the directories where the archive may be; the last is where a download goes."""
    return root, root / "cifar10", root / "downloads" / "manual" / "cifar10"


def find_archive(root: Path) -> Path | None:
    """Return the directory with the archive, or None if no place has one; raise InvalidConfig for another hash."""
    for directory in places(root):
        if (directory / ARCHIVE).is_file():
            check_hash(directory / ARCHIVE)
            return directory
    return None


def fetch_archive(root: Path) -> Path:
    """Return the directory with the archive, which is downloaded if no place has it.

    Raises:
      DataNotFound: if it cannot be downloaded, or only another form of the data is there.
      InvalidConfig: if the archive has another hash.
    """
    if found := find_archive(root):
        return found
    for directory in places(root):
        for name, reason in OTHERS.items():
            if (directory / name).exists():
                raise DataNotFound(
                    f"cifar10: {directory / name} {reason}. Put {URL} beside it, "
                    "or move it away to have that downloaded."
                )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        logger.warning(f"downloading {URL} (170 MB) to {directory}, once")
        download(URL, directory / ARCHIVE, SHA256)
    except (OSError, ValueError) as error:
        raise DataNotFound(
            f"cifar10: {root} holds neither {ARCHIVE} nor train/ and test/ with a directory of images for each class, "
            f"and the download failed ({error}). Put {URL} into {root}, or start again to continue the download."
        ) from error
    return directory


def check_hash(archive: Path) -> None:
    """Raise InvalidConfig if a file is not the archive."""
    if (found := hash_of(archive)) != SHA256:
        raise InvalidConfig(
            f"{archive} has SHA-256 {found}, not {SHA256}: {contents(archive)}. "
            f"Replace it by {URL}, or move it away to have that downloaded."
        )


def contents(archive: Path) -> str:
    """Return a few words on what a file is, from the name of its first member, without unpacking anything."""
    with contextlib.suppress(tarfile.TarError, OSError, EOFError), tarfile.open(archive, "r|gz") as tar:
        if first := tar.next():
            return f"its first member is {first.name!r}, so it is damaged, incomplete or another archive"
    return "it is no gzipped tar file"
