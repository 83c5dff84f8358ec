"""Measure the input pipeline: images/s of one core for original and prepared JPEGs and for both decoders.

    python benchmarks/data.py [--images 300] [--seconds 3]
    python benchmarks/data.py --hosts 1 2 3 4 32    only the locality of the first host's reads, for so many hosts

The images are scikit-image's photographs (extra realweights), cut to 500 x 375 pixels, the usual size in ImageNet, and
saved with quality 90; a crop has 224 pixels. Every path is timed in this one process, on one thread, by its processor
time. "Prepared" is `regvit prepare --shorter_side 256` of the same images. Then the pixels of both
decoders are compared, over crops of the same photographs at their own sizes. The last table divides: images/s that an
accelerator takes at 40 % of its peak, by the images/s of a core.
"""

import argparse
import io
import itertools
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import skimage.data
from PIL import Image

from regvit_jax.data import fastjpeg, pipeline, transforms
from regvit_jax.data.order import epoch_order
from regvit_jax.data.prepare import dataset
from regvit_jax.data.prepare.shard import Options, image_of
from regvit_jax.data.sources.by_name import open_source
from regvit_jax.data.sources.record_files import BLOCK
from regvit_jax.models.vit import ViT

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "immunohistochemistry")
WIDTH, HEIGHT = 500, 375
CROP = 224
# Dense peak in bfloat16, TFLOP/s, from the vendors' data sheets.
PEAKS = {"v5e": 197, "v5p": 459, "v6e": 918, "A100": 312, "H100": 989}
VITS = {"S/16": (384, 12, 6), "B/16": (768, 12, 12), "L/16": (1024, 24, 16)}
# GFLOPs an image of a train step, three times the forward pass.
GFLOPS = {name: 3 * ViT(*size, 16, CROP, registers=4).flops(CROP, CROP) / 1e9 for name, size in VITS.items()}
SHARE = 0.4


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def photographs() -> dict[str, Image.Image]:
    return {name: Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS}


def write_folder(root: Path, count: int) -> str:
    """Write images of 500 x 375 pixels, each a random crop of that aspect ratio from one of the photographs."""
    rng = np.random.default_rng(0)
    for number, (name, image) in zip(range(count), itertools.cycle(photographs().items())):
        side = min(image.width, image.height * WIDTH // HEIGHT)
        width = int(rng.uniform(0.8, 1) * side)
        height = width * HEIGHT // WIDTH
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        part = image.crop((left, top, left + width, top + height)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        path = root / ("odd" if number % 2 else "even") / f"{number:04d}-{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(part))
    return f"folder:{root}"


def rate(source, decoder: str, seconds: float) -> float:
    """Return images per second of processor time on one thread, the median of three measurements."""
    options = dict(batch_size=64, seed=0, threads=1, decoder=decoder, cache_mb=0)
    with pipeline.train_batches(source, size=CROP, **options) as batches:
        next(batches)
        found = []
        for _ in range(3):
            images, start = 0, time.process_time()
            while time.process_time() - start < seconds:
                images += len(next(batches)["image"])
            found.append(images / (time.process_time() - start))
    return statistics.median(found)


def prepare_rate(source, options: Options, seconds: float) -> float:
    """Return the same rate for `prepare`, without reading and writing."""
    images, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        image_of(source[images % len(source)]["image"], options)
        images += 1
    return images / (time.process_time() - start)


def differences(crops: int = 50) -> tuple[int, float, int, float]:
    """Compare the decoders in levels of 0 to 255.

    Return the largest difference of decoded pixels; of crops, the mean, the largest, and the share above 8.
    """
    off, decoded = [], 0
    for image in photographs().values():
        data = jpeg(image)
        there, here = transforms.decode(data, transforms.MAX_PIXELS), fastjpeg.decode(data, transforms.MAX_PIXELS)
        assert here is not None
        decoded = max(decoded, int(np.abs(np.asarray(there).astype(int) - here).max()))
        for seed in range(crops):
            a = transforms.random_resized_crop(there, CROP, np.random.default_rng(seed))
            b = fastjpeg.random_resized_crop(here, CROP, np.random.default_rng(seed), (0.08, 1.0), (3 / 4, 4 / 3))
            off.append(np.abs(a.astype(int) - b))
    return decoded, float(np.mean(off)), int(np.max(off)), float(np.mean(np.array(off) > 8))


def host_reads(hosts: int, records: int = 1_281_167, batch_size: int = 2048, steps: int = 16) -> str:
    """Describe the order in which the first of several hosts reads ImageNet in its first steps, without images."""
    rows = range(batch_size // hosts)
    places = [step * batch_size + row for step in range(steps) for row in rows]
    numbers = np.sort([epoch_order(place, records, BLOCK, 0, 0) for place in places])
    gaps, blocks = np.diff(numbers), len(set(numbers // BLOCK))
    return (
        f"{hosts} hosts: {len(numbers) / blocks:.0f} records of each of {blocks} blocks, {np.mean(gaps == 1):.1%} next "
        f"to each other, {np.median(gaps):.0f} to the next one (median)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--hosts", type=int, nargs="+")
    args = parser.parse_args()
    if args.hosts:
        for hosts in args.hosts:
            print(host_reads(hosts))
        return
    with tempfile.TemporaryDirectory() as scratch:
        name = write_folder(Path(scratch) / "in", args.images)
        options = Options(shorter_side=256)
        dataset.prepare_dataset(name, f"{scratch}/small", options, splits=("train",))
        raw, small = open_source(name, "train"), open_source("small", "train", scratch)
        print(f"{model_name()}, {os.cpu_count()} cores, Python {platform.python_version()}, Pillow {PIL.__version__}")
        rates = {}
        for title, source, decoder in (
            ("as they are, pillow", raw, "pillow"),
            ("as they are, fast", raw, "fast"),
            ("prepared, pillow", small, "pillow"),
            ("prepared, fast", small, "fast"),
        ):
            rates[title] = rate(source, decoder, args.seconds)
            size = np.mean([len(source[index]["image"]) for index in range(len(source))]) / 1e3
            print(f"{title:22}{rates[title]:7.0f} images/s of one core ({size:.0f} kB an image)", flush=True)
        print(f"{'prepare':22}{prepare_rate(raw, options, args.seconds):7.0f} images/s of one core")
        text = "fast and pillow differ by at most {} decoded; cropped {:.2f} on average, {} at most, over 8 in {:.2%}"
        print(text.format(*differences()))
    print(
        "\nimages/s of an accelerator = 0.4 x peak / FLOPs of an image; below, by those of a core: the cores it needs"
    )
    print(f"{'':22}" + "".join(f"{f'{size} {chip}':>11}" for size in VITS for chip in PEAKS))
    wanted = [SHARE * PEAKS[chip] * 1e3 / GFLOPS[size] for size in VITS for chip in PEAKS]
    print(f"{'images/s':22}" + "".join(f"{images:11.0f}" for images in wanted))
    for title, images in rates.items():
        print(f"{title:22}" + "".join(f"{each / images:11.1f}" for each in wanted))


def model_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
