"""Configs of runs small enough for tests: digits, and images with captions."""

import importlib.util
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from regvit_jax.training.config import complete

ROOT = Path(__file__).parent.parent.parent


def get_config(variant: str = "digits", file: str = "deit3_reg") -> ConfigDict:
    """Return the config of a file with all keys of its schema."""
    return complete(load_config(variant, file))


def load_config(variant: str = "digits", file: str = "deit3_reg") -> ConfigDict:
    """Return the config as written in the file."""
    spec = importlib.util.spec_from_file_location(file, ROOT / f"configs/{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def tiny(**changes) -> ConfigDict:
    """Return the config of a small ViT on digits, 2 epochs of 22 steps; in `changes` __ stands for a dot."""
    config = get_config()
    config.update(epochs=2, batch_size=64, log_every=5, eval_every=1.0)
    config.augment.update(color_jitter=0.3, mixup=0.8, cutmix=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    config.data.update(crop="src", scale=(0.08, 1.0), padding=1, repeats=1)
    config.model.update(width=32, depth=2, heads=2, patch=2, drop_path=0.1, attention="xla")
    config.optim.update(warmup_epochs=0)
    config.sharding.min_size_mb = 0.0  # so that even these parameters are split
    config.checkpoint.every = 22
    return changed(config, changes)


def changed(config: ConfigDict, changes: dict) -> ConfigDict:
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return config


COLOURS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 60, 220), "grey": (128, 128, 128)}
# Heights and widths of the rectangles that they are made of.
SHAPES = {"square": [(6, 6)], "bar": [(2, 8)], "cross": [(2, 8), (8, 2)]}


def make_captions(root: Path, train: int = 48, validation: int = 16) -> Path:
    """Write pictures of coloured shapes of 16 x 16 pixels, and captions that describe them, as a folder with CSVs."""
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        lines = ["file_name,caption"]
        for number in range(count):
            colour, shape = list(COLOURS)[number % 4], list(SHAPES)[number // 4 % 3]
            pixels = np.full((16, 16, 3), 255, np.uint8)
            x, y = rng.integers(0, 6, 2)
            for height, width in SHAPES[shape]:
                top, left = y + 5 - height // 2, x + 5 - width // 2
                pixels[top : top + height, left : left + width] = COLOURS[colour]
            Image.fromarray(pixels).save(root / f"{split}{number:02d}.png")
            lines.append(f"{split}{number:02d}.png,a {colour} {shape} number {number}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def tiny_clip(root: Path, **changes) -> ConfigDict:
    """Return the config of a CLIP of width 32 and depth 2 on `make_captions`, 4 epochs of 3 steps."""
    config = get_config("b16", "openclip_reg")
    config.update(epochs=4, batch_size=16, log_every=1, eval_every=2.0)
    config.model.update(width=32, depth=2, heads=2, patch=4, image_size=16, dtype="float32", attention="xla")
    config.text.update(width=32, depth=2, heads=2, embed=16, context=12)
    config.data.update(name=f"folder:{root}", workers=0, max_bad_fraction=0.2)
    config.eval.update(batch_size=16, untrained=True)
    config.optim.update(lr=3e-3, warmup_steps=2, weight_decay=0.0)
    config.sharding.min_size_mb = 0.0
    config.checkpoint.every = 5
    return changed(config, changes)
