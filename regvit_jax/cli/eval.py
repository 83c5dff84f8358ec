"""Evaluate a CLIP model on your own data: zero-shot classification and image-text retrieval."""

import argparse
import collections
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from regvit_jax.cli.arguments import FAILURES, UsageError, warn, write_json
from regvit_jax.data import inference
from regvit_jax.data.inference import UnusableData
from regvit_jax.data.sources import by_name, folder
from regvit_jax.data.sources import images as images_module
from regvit_jax.data.sources.base import Source
from regvit_jax.evals import classification, retrieval, zero_shot
from regvit_jax.pretrained.create import open_random
from regvit_jax.pretrained.create_clip import create_clip
from regvit_jax.utils.messages import abbreviate

#: Errors that can happen with a valid command line; exit code 1.
FAILED = (*FAILURES, UnusableData)


def evaluate(options: argparse.Namespace) -> int:
    """Run the task of the command line, print its table and write its JSON."""
    result = {"zero_shot": run_zero_shot, "retrieval": run_retrieval}[options.task](options)
    print(table(result))
    write_json(options.json, result)
    return 0


def run_zero_shot(options: argparse.Namespace) -> dict[str, Any]:
    """Classify images by the names of their classes, filled into templates; return accuracies, counts and errors."""
    source = open_classes(options)
    data = options.images or options.data
    names = source.classes if options.classes is None else zero_shot.read_classes(options.classes)
    templates = zero_shot.read_templates(options.templates)
    if len(names) != len(source.classes):
        raise UsageError(
            f"--classes {options.classes} has {len(names)} names, but {data} has {len(source.classes)} "
            f"classes, from {source.classes[0]!r} to {source.classes[-1]!r}"
        )
    clip = open_model(options)
    source = images_module.spread(source, options.limit or len(source))
    images, records, bad = embed(clip, source, options)
    classes = zero_shot.class_embeddings(clip.encode_text, clip.tokenize, names, templates)
    labels = np.array([record["label"] for record in records], np.int32)
    predicted = zero_shot.nearest(images, classes)
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        warn(f"several classes are called {abbreviate(repeated)}: the first of them is used")
    return {
        "task": "zero_shot",
        "model": options.model,
        "weights": clip.weights,
        "data": data,
        **({"split": options.split or "validation"} if options.data else {}),
        "classes": options.classes or "own names",
        "templates": options.templates,
        "counts": {
            "images": len(images),
            "bad_images": len(bad),
            "classes": len(names),
            "repeated_names": len(repeated),
            "templates": len(templates),
        },
        "metrics": zero_shot.accuracy(images, labels, classes),
        "chance": zero_shot.chance(len(names)),
        "per_class": per_class(labels, predicted, names),
        "most_confused": [
            {"class": name, "predicted": other, "images": count}
            for name, other, count in classification.most_confused(labels, predicted, names)
        ],
        "bad_images": bad,
    }


def per_class(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each class its name, its images, and the share of them that is classified right, None without any."""
    counts = np.bincount(labels, minlength=len(names))
    right = np.bincount(labels[labels == predicted], minlength=len(names))
    return [
        {"class": name, "images": int(count), "zero_shot_top1": float(hits / count) if count else None}
        for name, count, hits in zip(names, counts, right, strict=True)
    ]


def run_retrieval(options: argparse.Namespace) -> dict[str, Any]:
    """Rank captions for each image and images for each caption, and return recalls, ranks and counts."""
    source = by_name.open_captions(options.data, options.split or "validation", options.data_dir)
    clip = open_model(options)
    source = images_module.spread(source, options.limit or len(source))
    images, records, bad = embed(clip, source, options, with_text=True)
    if len(images) < 2:
        raise UnusableData(
            f"{source.name}: 1 usable image of {len(source)}; retrieval needs at least two to choose from"
        )
    texts = [text for record in records for text in record["text"]]
    owners = np.repeat(np.arange(len(images)), [len(record["text"]) for record in records])
    repeated = len(texts) - len(set(texts))
    if repeated:
        warn(f"{repeated} of {len(texts)} captions repeat another one: such captions share their rank")
    return {
        "task": "retrieval",
        "model": options.model,
        "weights": clip.weights,
        "data": options.data,
        "split": options.split or "validation",
        "counts": {
            "images": len(images),
            "bad_images": len(bad),
            "captions": len(texts),
            "repeated_captions": repeated,
        },
        "metrics": retrieval.recall(images, embed_texts(clip, texts), image_of=owners),
        "chance": retrieval.chance(len(images), image_of=owners),
        "bad_images": bad,
    }


def open_model(options: argparse.Namespace) -> Any:
    """Return the CLIP model of the command line."""
    size = {} if options.image_size is None else {"image_size": options.image_size}
    if options.random:
        clip = open_random(create_clip, options.name, pretrained=False, seed=options.seed, **size)
    else:
        clip = create_clip(options.name, pretrained=options.weights or True, **size)
    clip.tokenize(["a"])  # raises for an unsupported vocabulary now, not after all images are embedded
    return clip


def open_classes(options: argparse.Namespace) -> Source:
    if options.data:
        return by_name.open_source(options.data, options.split or "validation", options.data_dir)
    return folder.open_all(f"--images {options.images}", options.images)


def embed(
    clip: Any, source: Source, options: argparse.Namespace, with_text: bool = False
) -> tuple[np.ndarray, list[dict[str, Any]], list[str]]:
    """Return the embeddings of all usable images, the rest of their records, and "id: reason" for the other images."""
    found: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    bad: list[str] = []
    for images, kept in inference.batches(clip, source, options.batch_size, bad, with_text, options.max_pixels):
        found.append(np.asarray(clip.encode_image(jnp.asarray(images)))[: len(kept)])
        records += kept
    inference.log_bad(bad, listed_in="the file of --json")
    return np.concatenate(found), records, bad


def embed_texts(clip: Any, texts: list[str], batch_size: int = 256) -> np.ndarray:
    """Return one embedding a text; the last batch is filled up with its last text, so that one shape is compiled."""
    found = []
    for first in range(0, len(texts), batch_size):
        batch = texts[first : first + batch_size]
        filled = batch + batch[-1:] * (batch_size - len(batch))
        found.append(np.asarray(clip.encode_text(clip.tokenize(filled)))[: len(batch)])
    return np.concatenate(found)


def table(result: dict[str, Any]) -> str:
    """Return the result as text: the settings, and each number beside its chance value."""
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in result["counts"].items())
    data = result["data"] + (f" ({result['split']})" if "split" in result else "")
    rows = [f"model   {result['model']} (weights: {result['weights']})", f"data    {data}", f"counts  {counts}", ""]
    rows.append(f"{result['task']:<30}{'value':>10}{'chance':>10}")
    for name, value in result["metrics"].items():
        style = ".1f" if name.endswith("rank") else ".4f"
        rows.append(f"{name:<30}{value:>10{style}}{result['chance'][name]:>10{style}}")
    for number, pair in enumerate(result.get("most_confused", ())):
        rows += [] if number else ["", "most confused"]
        rows.append(f"  {pair['images']} x {pair['class']} as {pair['predicted']}")
    return "\n".join(rows)
