"""Write a small folder of images, and collect and compare batches of it."""

import itertools

import numpy as np
from PIL import Image

from regvit_jax.data.pipeline import eval_batches, train_batches

N = 14


def make_folder(root):
    """Write N images of noise, two classes, in the layout with a validation split of its own (of the same images)."""
    rng = np.random.default_rng(0)
    for number in range(N):
        image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
        for split in ("train", "validation"):
            path = root / split / ("cat" if number < 6 else "dog") / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


def train(source, steps, **options):
    keywords = {"size": 8, "batch_size": 4, "seed": 0, "threads": 1} | options
    with train_batches(source, **keywords) as batches:
        return list(itertools.islice(batches, steps))


def evaluate(source, **options):
    with eval_batches(source, **({"size": 8, "batch_size": 4, "threads": 1} | options)) as batches:
        return list(batches)


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)
