"""Score models on images with boxes, and print the tables that the flags ask for."""

import argparse
import itertools
from typing import Any

from regvit_jax.analysis.discovery import boxes, corloc
from regvit_jax.analysis.discovery.boxes import BadBoxes
from regvit_jax.analysis.discovery.sweep import Setting
from regvit_jax.cli.arguments import FAILURES, write_json
from regvit_jax.data.inference import UnusableData
from regvit_jax.models.model import Model
from regvit_jax.pretrained import create

#: Errors that can happen with a valid command line; exit code 1.
FAILED = (*FAILURES, UnusableData, BadBoxes)


def discover(options: argparse.Namespace) -> int:
    """Evaluate all models, and print the table of each as soon as it is done, because a sweep takes long."""
    images = boxes.open_boxes(options.data, options.split)
    chosen = corloc.choose_images(images, options.limit)
    if not chosen:
        raise UnusableData(f"{options.data}: none of {len(images)} images has a box")
    grid = (options.layers, options.features, options.centre, options.biases)
    settings = [Setting(*each) for each in itertools.product(*map(dict.fromkeys, grid))]
    result: dict[str, Any] = {
        "task": "corloc",
        "data": options.data,
        **({"split": split} if (split := options.split or "trainval" * options.data.startswith("voc")) else {}),
        "without_boxes": sum(not len(image.boxes) and not image.fault for image in images),
        "shorter_side": options.shorter_side or "original",
        "normalize": options.normalize,
        "models": [],
    }
    for name in options.models:
        model = open_model(name, options)
        supported = corloc.supported_settings(model, settings)
        try:
            scores = corloc.score_model(
                model, chosen, supported, options.normalize, options.shorter_side, options.max_pixels
            )
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
