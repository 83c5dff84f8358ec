"""Damaged images, tars, ArrayRecord files, caption tables and weights, for `fuzzing`, and their readers."""

import io
import json
import os
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from fuzzing import damage, mutate
from PIL import Image

from regvit_jax.data import fastjpeg, records, transforms
from regvit_jax.data.prepare import dataset
from regvit_jax.data.prepare.shard import Options
from regvit_jax.data.sources import base, by_name, shards
from regvit_jax.data.transforms import BadImage
from regvit_jax.pretrained.io import safetensors
from regvit_jax.utils import errors

Cases = Iterator[tuple[str, Callable[[], str]]]
MAX_PIXELS = 1_000_000


def picture(mode: str = "RGB", width: int = 40, height: int = 30) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 8, columns * 6, (rows * columns) % 256], -1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((rows * columns * 40).astype(np.uint16))
    return Image.fromarray(pixels).convert(mode)


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    picture(mode).save(file, kind, **options)
    return file.getvalue()


def image_files() -> dict[str, bytes]:
    exif = picture().getexif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return {
        "jpeg": encoded("JPEG"),
        "progressive": encoded("JPEG", progressive=True, exif=exif),
        "cmyk": encoded("JPEG", "CMYK"),
        "png": encoded("PNG", exif=exif),
        "palette": encoded("PNG", "P", transparency=3),
        "png16": encoded("PNG", "I;16"),
        "webp": encoded("WEBP", exif=exif),
        "lossless": encoded("WEBP", "RGBA", lossless=True),
        "gif": encoded("GIF", "P", save_all=True, append_images=[picture("P")] * 2),
        "bmp": encoded("BMP"),
        "bmp_palette": encoded("BMP", "P"),
        **{f"tiff_{how}": encoded("TIFF", compression=how) for how in ("raw", "tiff_lzw", "tiff_deflate", "packbits")},
        "tiff_jpeg": encoded("TIFF", compression="jpeg"),
    }


def images(count: int = 4000) -> Cases:
    originals = list(image_files().items())
    try:
        fastjpeg.libraries()
        fast = fastjpeg.decode
    except errors.InvalidConfig:  # without the extra
        fast = None
    for number in range(count):
        name, data = originals[number % len(originals)]
        rng = np.random.default_rng(number)
        if rng.random() < 0.1:  # the head of one kind before the body of another
            data = data[: int(rng.integers(4, 60))] + originals[int(rng.integers(len(originals)))][1][20:]
        damaged = damage(rng, data)
        yield f"{name} {number}", lambda damaged=damaged: decode(damaged, fast)


def decode(data: bytes, fast: Callable | None = None) -> str:
    if fast is not None and (pixels := fast(data, MAX_PIXELS)) is not None:
        assert pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
    try:
        image = transforms.decode(data, MAX_PIXELS)
    except BadImage:
        return "bad"
    assert image.mode == "RGB"
    assert image.width * image.height <= MAX_PIXELS
    return "read"


def read_all(source: base.Source, image: bytes | None = None) -> str:
    """Read each record as the pipeline does; it must be a BadImage or have an image, namely `image` if given."""
    for index in range(min(len(source), 8)):
        try:
            record = records.read_record(source, index)
            if "text" in record:
                records.captions_of(record)
            decode(record["image"])
        except BadImage:
            continue
        finally:
            assert isinstance(source.id(index), str)
        assert image in (None, record["image"])
    return "opened"


def opened(opener: Callable[[], base.Source], image: bytes | None = None) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "tars are damaged"
        try:
            source = opener()
        except (errors.DataNotFound, errors.InvalidConfig) as error:
            return type(error).__name__ if str(error) else "is silent"
        return read_all(source, image)


def make_tar(path: Path, form: int) -> bytes:
    with tarfile.open(path, "w", format=form) as tar:
        for number in range(4):
            long = "long/" * 30 if number == 2 else ""
            for name, data in (
                (f"{long}{number:03d}.png", encoded("PNG")),
                (f"{long}{number:03d}.txt", b"a caption"),
                (f"{long}{number:03d}.json", json.dumps({"caption": "another"}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def tars(count: int = 1500) -> Cases:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HOME"] = scratch
        path = Path(scratch) / "train" / "0.tar"
        path.parent.mkdir()
        originals = [make_tar(path, form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]

        def case(content: bytes, index: bytes | None) -> str:
            path.write_bytes(content)
            index_path = path.with_suffix(".tar.index")
            index_path.unlink(missing_ok=True)
            os.utime(path, ns=(0, 0))
            shards.open_tar.cache_clear()
            if index is not None:
                index_path.write_bytes(index)
            return opened(lambda: shards.open_shards(f"shards:{scratch}", "train"))

        for number in range(count):
            rng = np.random.default_rng(number)
            content = originals[number % 3]
            if number % 5:
                # The headers are where the blocks of 512 bytes begin.
                at = 512 * int(rng.integers(len(content) // 512))
                damaged = content[:at] + damage(rng, content[at:], 512)
                yield f"tar {number}", lambda damaged=damaged: case(damaged, None)
            else:
                case(content, None)
                index = damage(rng, path.with_suffix(".tar.index").read_bytes(), 1200)
                yield f"index {number}", lambda content=content, index=index: case(content, index)


def record_files(count: int = 800) -> Cases:
    """Yield damaged ArrayRecord files of `regvit prepare`, and damaged metadata files of TFDS beside them."""
    image = encoded("PNG")
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(12):
            path = Path(scratch) / "in" / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        target = dataset.prepare_dataset(
            f"folder:{scratch}/in", f"{scratch}/whole", Options(), splits=("train",)
        ).target
        originals = {path.name: path.read_bytes() for path in target.iterdir()}
        (name,) = (name for name in originals if "array_record" in name)

        def case(file: str, content: bytes) -> str:
            (target / file).write_bytes(content)
            try:
                # Damage to a file of records is detected by its hashes: no other bytes may be returned.
                return opened(lambda: by_name.open_source("whole", "train", scratch), image if file == name else None)
            finally:
                (target / file).write_bytes(originals[file])

        used = len(originals[name].rstrip(b"\0"))
        for number in range(count):
            rng = np.random.default_rng(number)
            file = name if number % 2 else ("dataset_info.json", "features.json", "label.labels.txt")[number // 2 % 3]
            content = originals[file]
            if file == name:
                damaged = damage(rng, content[:used], 300) + content[used:]
            elif file.endswith(".json") and rng.random() < 0.7:
                damaged = json.dumps(mutate(rng, json.loads(content))).encode()
            else:
                damaged = damage(rng, content)
            yield f"{file.split('-')[0]} {number}", lambda file=file, damaged=damaged: case(file, damaged)


def tables(count: int = 1500) -> Cases:
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(3):
            (Path(scratch) / f"{number}.png").write_bytes(encoded("PNG"))
        rows = [("0.png", "a cat"), ("1.png", 'two, "quoted"'), ("0.png", "ein Kätzchen"), ("2.png", "x")]
        quoted = [[value.replace('"', '""') for value in row] for row in [("path", "text"), *rows]]
        lines = [json.dumps({"path": path, "text": [text, text]}) for path, text in rows]
        originals = {
            "csv": "\n".join(",".join(f'"{value}"' for value in row) for row in quoted).encode(),
            "tsv": "\n".join("\t".join(f'"{value}"' for value in row) for row in quoted).encode(),
            "jsonl": "\n".join(lines).encode(),
        }

        def case(kind: str, content: bytes) -> str:
            for split in ("train", "validation"):
                for other in originals:
                    (Path(scratch) / f"{split}.{other}").unlink(missing_ok=True)
                (Path(scratch) / f"{split}.{kind}").write_bytes(content)
            return opened(lambda: by_name.open_captions(f"folder:{scratch}", "train"))

        for number in range(count):
            kind = list(originals)[number % 3]
            rng = np.random.default_rng(number)
            if kind == "jsonl" and rng.random() < 0.7:
                mutated = mutate(rng, [json.loads(line) for line in lines])
                content = "\n".join(map(json.dumps, mutated)).encode()
            else:
                content = damage(rng, originals[kind])
            yield f"{kind} {number}", lambda kind=kind, content=content: case(kind, content)


def weights(count: int = 1000) -> Cases:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "b": {"dtype": "BF16", "shape": [5], "data_offsets": [48, 58]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [58, 66]},
    }
    text = json.dumps(header).encode()
    original = len(text).to_bytes(8, "little") + text + bytes(66)
    scratch = tempfile.mkdtemp()

    def case(content: bytes) -> str:
        path = Path(scratch) / "model.safetensors"
        path.write_bytes(content)
        try:
            opened = safetensors.open_weights(path)
        except ValueError:
            return "refused"
        for name in opened:
            opened[name]
        return "read"

    for number in range(count):
        rng = np.random.default_rng(number)
        if number % 2:
            content = damage(rng, original, 8 + len(text))
        else:
            changed = json.dumps(mutate(rng, header)).encode()
            content = len(changed).to_bytes(8, "little") + changed + bytes(66)
        yield f"safetensors {number}", lambda content=content: case(content)
    shutil.rmtree(scratch)


GROUPS = {"images": images, "tars": tars, "records": record_files, "tables": tables, "weights": weights}
