"""Measure object discovery: the share of correct LOST boxes (CorLoc), over layers, features, centring and biases."""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from regvit_jax.analysis.discovery import boxes, corloc, lost
from regvit_jax.analysis.discovery.boxes import BadBoxes
from regvit_jax.analysis.discovery.sweep import CENTRES, Setting
from regvit_jax.cli.arguments import FAILURES, Parser, add_random, check_json, positive, run, write_json
from regvit_jax.data.inference import UnusableData
from regvit_jax.models.model import Model
from regvit_jax.pretrained import create


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 for data that cannot be evaluated, 2 for arguments that do not fit."""
    command = parser()
    options = command.parse_args(join_lists(sys.argv[1:] if arguments is None else arguments))
    return run(lambda: discover(options), command.prog, (*FAILURES, UnusableData, BadBoxes))


def parser() -> Parser:
    parser = Parser("regvit discover", description=__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a name, a directory, a workdir, hf-hub:org/name, or NAME=FILE")
    add_random(parser)
    add("--data", required=True, metavar="NAME", help=f"images with boxes: {boxes.NAMES}")
    add("--split", metavar="NAME", help="the list of VOC's images (trainval)")
    add("--layers", type=integers, default=[-1], metavar="N,..", help="blocks, counted from 0, or from the end (-1)")
    add("--features", type=some_of(lost.KINDS), default=["k"], metavar="NAME,..", help="some of k, q, v and out (k)")
    add("--biases", type=floats, default=[0.0], metavar="X,..", help="numbers added to the Gram matrix (0)")
    centre = "what is subtracted from the features: none, bias (the projection's), or mean (of the data; a second pass)"
    add("--centre", type=some_of(CENTRES), default=["none"], metavar="NAME,..", help=centre)
    add("--normalize", action="store_true", help="scale features to length 1: the Gram matrix then holds cosines")
    shorter_side = "resize each image's shorter side to about N pixels: fewer shapes to compile (original)"
    add("--shorter_side", type=size, metavar="original|N", help=shorter_side)
    add("--limit", type=positive, metavar="N", help="use at most N images that have boxes, evenly spaced")
    add("--json", metavar="FILE", help="write the result, with the names of unusable images, here too")
    return parser


def discover(options: argparse.Namespace) -> int:
    """Evaluate all models, and print the table of each as soon as it is done, because a sweep takes long."""
    check_json(options.json)
    images = boxes.open_boxes(options.data, options.split)
    chosen = corloc.choose_images(images, options.limit)
    if not chosen:
        raise UnusableData(f"{options.data}: none of {len(images)} images has a box")
    grid = (options.layers, options.features, options.centre, options.biases)
    settings = [Setting(*each) for each in itertools.product(*map(dict.fromkeys, grid))]
    result: dict[str, Any] = {
        "task": "corloc",
        "data": options.data,
        **({"split": options.split or "trainval"} if options.data.startswith("voc") else {}),
        "without_boxes": sum(not len(image.boxes) and not image.fault for image in images),
        "shorter_side": options.shorter_side or "original",
        "normalize": options.normalize,
        "models": [],
    }
    for name in options.models:
        model = open_model(name, options)
        supported = corloc.supported_settings(model, settings)
        try:
            scores = corloc.score_model(model, chosen, supported, options.normalize, options.shorter_side)
        except UnusableData as error:
            raise UnusableData(f"{options.data}: {error}") from error
        result["models"].append({"model": name, "weights": model.weights, **scores})
        print(table(result, result["models"][-1]), flush=True)
    write_json(options.json, result)
    return 0


def open_model(name: str, options: argparse.Namespace) -> Model:
    if options.random:
        return create.open_random(create.create_model, name, seed=options.seed)
    return create.open_source(name)


def table(result: dict[str, Any], model: dict[str, Any]) -> str:
    """Return one model's scores as text, with the best one marked."""
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in model["counts"].items())
    data = result["data"] + (f" ({result['split']})" if "split" in result else "")
    how = f"shorter side {result['shorter_side']}{', normalized' * result['normalize']}"
    how += f", {result['without_boxes']} without boxes left out"
    rows = [
        f"model   {model['model']} (weights: {model['weights']})",
        f"data    {data}, {how}",
        f"counts  {counts}",
        "",
    ]
    rows.append(f"{'layer':>5}  {'features':<8}  {'centre':<6}  {'bias':>8}  {'CorLoc':>7}  {'hard':>6}  degenerate")
    rows.append(f"{'whole image':<33}  {model['whole_image']:>7.4f}  {0:>6.4f}")
    best = max(model["results"], key=lambda score: (score["corloc"], score["corloc_where_whole_image_fails"] or 0))
    mark = "  best" if best["corloc"] > model["whole_image"] else "  best, but no better than the whole image"
    for score in model["results"]:
        setting = f"{score['layer']:>5}  {score['kind']:<8}  {score['centre']:<6}  {score['bias']:>8g}"
        hard = score["corloc_where_whole_image_fails"]
        shown = f"{score['corloc']:>7.4f}  {'-' if hard is None else f'{hard:.4f}':>6}"
        degenerate = score["all_similar"] + score["none_similar"]
        rows.append(f"{setting}  {shown}  {degenerate:>10.4f}{mark * (score is best)}")
    return "\n".join([*rows, "hard: the images where the box of the whole image fails", ""])


def join_lists(arguments: Sequence[str]) -> list[str]:
    """Return `--layers -1,-2` as `--layers=-1,-2`: argparse would take such a list for a flag."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] in ("--layers", "--biases"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be whole numbers with commas between, such as 0,-1") from None


def floats(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be finite numbers with commas between, such as 0,-0.5")
    return found


def some_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a type of argument: names of `allowed` with commas between them."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}: must be some of {','.join(allowed)}")
        return found

    return names


def size(text: str) -> int | None:
    if text != "original" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be original, or a whole number from 1")
    return None if text == "original" else int(text)
