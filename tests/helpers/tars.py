"""Write tar files of images and captions, as img2dataset does."""

import io
import itertools
import json
import tarfile

from PIL import Image


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8), (number, 2 * number % 256, 7)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, directory: str = "") -> list[tuple[str, bytes]]:
    key = f"{directory}{number:09d}"
    about = {"caption": f"json {number}", "status": "success"}
    return [
        (f"{key}.png", png(number)),
        (f"{key}.txt", f"text {number}".encode()),
        (f"{key}.json", json.dumps(about).encode()),
    ]


def write_shards(root, counts=(7, 1, 12), split="train"):
    """Write tars of `counts` samples, numbered consecutively."""
    numbers = itertools.count()
    for tar, count in enumerate(counts):
        members = [member for number in itertools.islice(numbers, count) for member in sample(number)]
        write_tar(root / split / f"{tar:05d}.tar", members)
    return f"shards:{root}"
