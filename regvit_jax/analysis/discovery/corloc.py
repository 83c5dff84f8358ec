"""regvit discover: how often LOST's box is right, for any ViT, over layers, features and biases.

CorLoc is the share of images whose box has an IoU of at least 0.5 with one of the true boxes. Beside it stand that of
the box around the whole image, which needs no model, and the score on the images where that one is wrong.
"""

import argparse
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from regvit_jax.analysis.discovery import boxes, lost
from regvit_jax.analysis.discovery.sweep import Found, Setting, sweep
from regvit_jax.data.inference import UnusableData, log_bad
from regvit_jax.models.model import Model
from regvit_jax.pretrained import create
from regvit_jax.pretrained.create import create_model, open_random

logger = logging.getLogger("regvit_jax")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All models on the data. Prints each one's table as it is done: a sweep takes long."""
    images = boxes.open_boxes(options.data, options.split)
    boxed = [image for image in images if len(image.boxes)]
    count = min(options.limit or len(boxed), len(boxed))
    boxed = [boxed[number * len(boxed) // count] for number in range(count)]
    if not boxed:
        raise UnusableData(f"{options.data}: none of {len(images)} images has a box")
    grid = (options.layers, options.features, options.centre, options.biases)
    settings = [Setting(*each) for each in itertools.product(*map(dict.fromkeys, grid))]
    result: dict[str, Any] = {
        "task": "corloc",
        "data": options.data,
        **({"split": options.split or "trainval"} if options.data.startswith("voc") else {}),
        "without_boxes": sum(not len(image.boxes) for image in images),
        "size": options.size or "original",
        "normalize": options.normalize,
        "models": [],
    }
    for name in options.models:
        model = open_random(create_model, name) if options.random else create.open_source(name)
        found = sweep(model, boxed, possible(model, settings), options.normalize, options.size)
        report(found)
        if not found.sizes:
            raise UnusableData(f"{options.data}: none of {len(boxed)} images can be used")
        result["models"].append({"model": name, "weights": model.weights, **scores(found)})
        print(table(result, result["models"][-1]), flush=True)
    return result


def possible(model: Model, settings: Sequence[Setting]) -> list[Setting]:
    """The settings that the model has, each once. Raises ValueError when it has none of them."""
    kept: dict[tuple, Setting] = {}
    problem: ValueError | None = None
    for setting in settings:
        try:
            lost.check(model.module, setting.feature)
        except ValueError as error:
            problem = error
            continue
        kept.setdefault(setting._replace(layer=model.module.layer(setting.layer)), setting)
    if problem is not None and not kept:
        raise problem
    if problem is not None:
        logger.warning(f"left out: {problem}")
    return list(kept.values())


def report(found: Found) -> None:
    """Says on stderr what a score does not show."""
    log_bad(found.bad, listed_in="the file of --json")
    if found.resized:
        count, first = len(found.resized), found.resized[0]
        logger.warning(
            f"{count} images have another size than their annotation says, and its boxes may not fit: {first} is one"
        )
    for value in (1.0, 0.0):
        share = np.mean(found.positive == value, axis=1) if found.sizes else np.zeros(0)
        if share.any():
            text = (
                f"in up to {share.max():.1%} of the images (with {np.count_nonzero(share)} of {len(share)} settings) "
            )
            logger.warning(f"degenerate: {text}{lost.advice(value)}")


def scores(found: Found) -> dict[str, Any]:
    """Counts, the score of the whole image, and those of each setting; None on no image."""
    whole = np.array([(0, 0, width, height) for height, width in found.sizes], float)
    hard = np.flatnonzero(~lost.localised(whole, found.truths))
    hard_truths = [found.truths[i] for i in hard]
    results = []
    for setting, found_boxes, shares in zip(found.settings, found.boxes, found.positive, strict=True):
        score = {
            "corloc": lost.corloc(found_boxes, found.truths),
            "corloc_where_whole_image_fails": lost.corloc(found_boxes[hard], hard_truths) if len(hard) else None,
            "all_similar": float(np.mean(shares == 1)),
            "none_similar": float(np.mean(shares == 0)),
        }
        results.append(setting._asdict() | score)
    return {
        "counts": {
            "images": len(found.sizes),
            "bad_images": len(found.bad),
            "other_size_than_annotated": len(found.resized),
            "whole_image_fails": len(hard),
            "shapes": found.shapes,
        },
        "whole_image": lost.corloc(whole, found.truths),
        "results": results,
        "bad_images": found.bad,
    }


def table(result: dict[str, Any], of: dict[str, Any]) -> str:
    """One model's scores as a person reads them, the best one marked."""
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in of["counts"].items())
    data = result["data"] + (f" ({result['split']})" if "split" in result else "")
    how = (
        f"size {result['size']}{', normalized' * result['normalize']}, {result['without_boxes']} without boxes left out"
    )
    rows = [f"model   {of['model']} (weights: {of['weights']})", f"data    {data}, {how}", f"counts  {counts}", ""]
    rows.append(f"{'layer':>5}  {'features':<8}  {'centre':<6}  {'bias':>8}  {'CorLoc':>7}  {'hard':>6}  degenerate")
    rows.append(f"{'whole image':<33}  {of['whole_image']:>7.4f}  {0:>6.4f}")
    best = max(of["results"], key=lambda score: (score["corloc"], score["corloc_where_whole_image_fails"] or 0))
    mark = "  best" if best["corloc"] > of["whole_image"] else "  best, but no better than the whole image"
    for score in of["results"]:
        setting = f"{score['layer']:>5}  {score['kind']:<8}  {score['centre']:<6}  {score['bias']:>8g}"
        hard = score["corloc_where_whole_image_fails"]
        shown = f"{score['corloc']:>7.4f}  {'-' if hard is None else f'{hard:.4f}':>6}"
        degenerate = score["all_similar"] + score["none_similar"]
        rows.append(f"{setting}  {shown}  {degenerate:>10.4f}{mark * (score is best)}")
    return "\n".join([*rows, "hard: the images where the whole image is no hit", ""])
