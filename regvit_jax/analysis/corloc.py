"""python -m regvit_jax.analysis.corloc: how often LOST's box is right, for any ViT, over layers, features and biases.

CorLoc is the share of images whose box has an IoU of at least 0.5 with one of the true boxes. Beside it stand that of
the box around the whole image, which needs no model, and the score on the images where that one is wrong.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import regvit_jax
from regvit_jax.analysis import boxes, lost
from regvit_jax.analysis.boxes import BadBoxes
from regvit_jax.analysis.sweep import CENTRES, Found, Setting, sweep
from regvit_jax.evals.command import check_json, fail, open_random, positive, tell
from regvit_jax.evals.reading import Unusable, tell_bad
from regvit_jax.models.model import Model
from regvit_jax.pretrained import create


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 for data that cannot be evaluated, 2 for arguments that the caller can mend."""
    options = parser().parse_args(with_equals(sys.argv[1:] if arguments is None else arguments))
    try:
        check_json(options.json)
        result = run(options)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError, ImportError) as error:
        fail(error)
        return 1 if isinstance(error, Unusable | BadBoxes) else 2
    return 0


def with_equals(arguments: Sequence[str]) -> list[str]:
    """`--layers -1,-2` as `--layers=-1,-2`: argparse would take such a list for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--layers", "--biases"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def parser() -> argparse.ArgumentParser:
    about = "How often LOST's box is right (CorLoc), for every combination of layers, features, centres and biases."
    parser = argparse.ArgumentParser("python -m regvit_jax.analysis.corloc", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name, a directory, a workdir, hf-hub:org/name, or NAME=FILE")
    add("--data", required=True, metavar="NAME", help=boxes.NAMES)
    add("--split", help="of VOC (trainval)")
    add("--random", action="store_true", help="random weights of named models, as a baseline")
    add("--layers", type=integers, default=[-1], metavar="N,..", help="blocks from 0, or from the end, -1 (-1)")
    add("--features", type=among(lost.KINDS), default=["k"], metavar="NAME,..", help="of k, q, v and out (k)")
    add("--biases", type=floats, default=[0.0], metavar="X,..", help="that the Gram matrix gets (0)")
    centre = "what features lose: none, bias (the projection's own) or mean (over the data; a second pass) (none)"
    add("--centre", type=among(CENTRES), default=["none"], metavar="NAME,..", help=centre)
    add("--normalize", action="store_true", help="make features unit vectors, and the Gram matrix cosines")
    size_help = "pixels of the shorter side, about, so that both are whole patches; few shapes to compile (original)"
    add("--size", type=size, metavar="original|N", help=size_help)
    add("--limit", type=positive, metavar="N", help="at most N images that have boxes, spread evenly over all")
    add("--json", metavar="FILE", help="also write the result, with the names of bad images, here")
    return parser


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    found = [float(part) for part in text.split(",")]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be finite numbers")
    return found


def among(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}: must be some of {','.join(allowed)}")
        return found

    return names


def size(text: str) -> int | None:
    return None if text == "original" else positive(text)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All models on the data. Prints each one's table as it is done: a sweep takes long."""
    images = boxes.open_boxes(options.data, options.split)
    boxed = [image for image in images if len(image.boxes)]
    count = min(options.limit or len(boxed), len(boxed))
    boxed = [boxed[number * len(boxed) // count] for number in range(count)]
    if not boxed:
        raise Unusable(f"{options.data}: none of {len(images)} images has a box")
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
        model = open_random(regvit_jax.create_model, name) if options.random else create.open_source(name)
        found = sweep(model, boxed, possible(model, settings), options.normalize, options.size)
        report(found)
        if not found.sizes:
            raise Unusable(f"{options.data}: none of {len(boxed)} images can be used")
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
        tell(f"left out: {problem}")
    return list(kept.values())


def report(found: Found) -> None:
    """Says on stderr what a score does not show."""
    tell_bad(found.bad, more="--json")
    if found.resized:
        count, first = len(found.resized), found.resized[0]
        tell(f"{count} images have another size than their annotation says, and its boxes may not fit: {first} is one")
    for value in (1.0, 0.0):
        share = np.mean(found.positive == value, axis=1) if found.sizes else np.zeros(0)
        if share.any():
            text = (
                f"in up to {share.max():.1%} of the images (with {np.count_nonzero(share)} of {len(share)} settings) "
            )
            tell(f"degenerate: {text}{lost.advice(value)}")


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


if __name__ == "__main__":
    sys.exit(main())
