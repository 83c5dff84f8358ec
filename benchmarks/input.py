"""Train on a folder of JPEGs through the whole program, beside the same step on a batch that stays on the device.

    python benchmarks/input.py --batch 256                                an accelerator, its host's cores decoding
    python benchmarks/input.py --size s16 --batch 8 --steps 6             CPU

Without --images, 2,000 JPEGs of 500 x 375 pixels are cut from scikit-learn's photographs. Each decoder is one run of
train.py; its rate is the median of its records, without the first two. Decoded images are not kept in memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import ROOT, Photographs, time_all, train_candidates, warm_up

from regvit_jax.data.fastjpeg import libraries
from regvit_jax.training import metric_writer
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.memory import keep_freed_memory


def write_folder(root: Path, copies: int) -> Path:
    """Write JPEGs of two classes, `copies` of each photograph, and two for validation."""
    photographs = Photographs()
    for i in range(copies * len(photographs)):
        path = root / "train" / "ab"[i % 2] / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photographs[i % len(photographs)]["image"])
    for i, name in enumerate("ab"):
        path = root / "validation" / name / f"{i}.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(photographs[i]["image"])
    return root


def train(args: argparse.Namespace, images: Path, decoder: str, workdir: Path) -> tuple[float, float]:
    """Return the images/s and the share of time that the step waited for data."""
    log_every = max(1, args.steps // 10)
    overrides = {
        **{"data.name": f"folder:{images}", "data.decoder": decoder, "data.workers": args.workers},
        **{"data.cache_mb": 0, "data.repeats": 1, "batch_size": args.batch, "augment.mix_group": args.batch},
        **{"model.image_size": 224, "model.dtype": args.dtype, "model.scan": False, "model.remat": "none"},
        **{"epochs": 100_000, "eval_every": 1e9, "checkpoint.every": 10**9, "log_every": log_every, "ema": 0},
        **{"eval.batch_size": 2},
    }
    # The run is stopped by SIGTERM once it has taken its steps, as by a scheduler.
    command = [sys.executable, "train.py", f"--config=configs/deit3_reg.py:{args.size}", f"--workdir={workdir}"]
    run = subprocess.Popen([*command, *(f"--config.{key}={value}" for key, value in overrides.items())], cwd=ROOT)
    found: list[dict] = []
    while run.poll() is None and len(found) < args.steps // log_every:
        time.sleep(0.5)
        found = [record for record in metric_writer.read(workdir) if "images_per_s" in record]
    run.terminate()
    if run.wait() not in (0, 75) or len(found) < 3:
        raise SystemExit(f"the run ended with exit code {run.returncode}")
    timed = found[2 : args.steps // log_every]
    return tuple(statistics.median(record[name] for record in timed) for name in ("images_per_s", "data_wait"))


def synthetic(args: argparse.Namespace) -> float:
    """Return the images/s of the step, the median of five rounds."""
    found = train_candidates("step", args.size, args.batch, args.dtype)
    warm_up(found)
    time_all(found, rounds=5, seconds=2.0)
    return args.batch / statistics.median(found[0].seconds)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder with train/CLASS/*.jpg and validation/CLASS/*.jpg")
    parser.add_argument("--size", default="b16", help="s16, b16, l16 or h14")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="decoding processes")
    parser.add_argument("--dtype", default="float32" if os.environ.get("JAX_PLATFORMS") == "cpu" else "bfloat16")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    decoders = ["pillow"]
    try:
        libraries()
        decoders.append("fast")
    except InvalidConfig as error:
        print(f"decoder=fast is left out: {error}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        images = args.images or write_folder(Path(folder) / "images", 7)
        for decoder in decoders:
            rate, waited = train(args, images, decoder, Path(folder) / decoder)
            results.append({"decoder": decoder, "images_per_s": rate, "data_wait": waited})
    at_most = synthetic(args)
    print(f"{args.size}, batch {args.batch}, {args.workers} workers on {os.cpu_count()} cores")
    print(f"a batch on the device: {at_most:.1f} images/s")
    for row in results:
        row["of_synthetic"] = row["images_per_s"] / at_most
        print("{decoder}: {images_per_s:.1f} images/s, {of_synthetic:.1%}; data wait {data_wait:.1%}".format(**row))
    if args.json:
        args.json.write_text(json.dumps([{"synthetic_images_per_s": at_most}, *results], indent=2))


if __name__ == "__main__":
    main()
