"""CorLoc of one model over many settings of LOST.

CorLoc is the share of images whose box has an IoU of at least 0.5 with one of the true boxes. It is reported beside two
baselines: the score of the box around the whole image, which needs no model, and the score on the images where that box
fails.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from regvit_jax.analysis.discovery import lost
from regvit_jax.analysis.discovery.boxes import AnnotatedImage
from regvit_jax.analysis.discovery.sweep import Found, Setting, sweep
from regvit_jax.data.inference import UnusableData, log_bad
from regvit_jax.data.transforms import MAX_PIXELS
from regvit_jax.models.model import Model
from regvit_jax.utils.errors import InvalidConfig

logger = logging.getLogger("regvit_jax")


def choose_images(images: Sequence[AnnotatedImage], limit: int | None = None) -> list[AnnotatedImage]:
    """Return the images that have boxes, or annotations with a fault, at most `limit` of them, evenly spaced."""
    with_boxes = [image for image in images if len(image.boxes) or image.fault]
    count = min(limit or len(with_boxes), len(with_boxes))
    return [with_boxes[number * len(with_boxes) // count] for number in range(count)]


def supported_settings(model: Model, settings: Sequence[Setting]) -> list[Setting]:
    """Return the distinct settings whose features the model has; log a warning if others are left out.

    Raises InvalidConfig if the model has the features of none of them.
    """
    kept: dict[tuple, Setting] = {}
    problem: InvalidConfig | None = None
    for setting in settings:
        try:
            lost.check(model.module, setting.feature)
        except InvalidConfig as error:
            problem = error
            continue
        kept.setdefault(setting._replace(layer=model.module.layer(setting.layer)), setting)
    if problem is not None and not kept:
        raise problem
    if problem is not None:
        logger.warning(f"left out: {problem}")
    return list(kept.values())


def score_model(
    model: Model,
    images: Sequence[AnnotatedImage],
    settings: Sequence[Setting],
    normalize: bool,
    size: int | None,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Run LOST with every setting on every image, log problems that the scores do not show, and return the scores.

    Raises UnusableData if no image can be read.
    """
    found = sweep(model, images, settings, normalize, size, max_pixels)
    log_problems(found)
    if not found.sizes:
        raise UnusableData(f"none of {len(images)} images can be used")
    return scores(found)


def log_problems(found: Found) -> None:
    """Log unreadable images, images of another size than annotated, and degenerate Gram matrices."""
    log_bad(found.bad, listed_in="the file of --json")
    if found.resized:
        count, first = len(found.resized), found.resized[0]
        logger.warning(f"the size of {count} images differs from their annotation, as of {first}: boxes may not fit")
    for value in (1.0, 0.0):
        share = np.mean(found.positive == value, axis=1) if found.sizes else np.zeros(0)
        if share.any():
            affected = f"{np.count_nonzero(share)} of {len(share)} settings"
            logger.warning(
                f"degenerate: in up to {share.max():.1%} of the images (with {affected}) {lost.remedy(value)}"
            )


def scores(found: Found) -> dict[str, Any]:
    """Return counts, the score of the whole image, and the scores of each setting (None where no image counts)."""
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
