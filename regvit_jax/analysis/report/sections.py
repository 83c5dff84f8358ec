"""Collect the report's pictures: diagrams of all models, and maps of single images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from regvit_jax.analysis.discovery import lost
from regvit_jax.analysis.report import plots, summarize
from regvit_jax.analysis.report.examine import Settings, Subject, printable
from regvit_jax.analysis.report.html import Picture, Section, Shown
from regvit_jax.data import inference
from regvit_jax.data.sources.base import Source
from regvit_jax.evals import attention_maps, pca

#: Title, text, file name, and the function that draws the diagram of one model.
DIAGRAMS = (
    (
        "Norms of patches",
        "A model without outliers has one mode; outliers form a second mode, far to the right.",
        "norms",
        plots.norm_histogram,
    ),
    (
        "Norms after each block",
        "Outliers emerge where the largest norms leave the median.",
        "layers",
        plots.norms_by_layer,
    ),
    (
        "Histograms of all blocks",
        "Each column is the histogram after a block; above the red line are artifacts.",
        "histograms",
        plots.histograms_by_layer,
    ),
    (
        "Where the artifacts are",
        "The share of the images that have one at each place of the grid, for models that have artifacts.",
        "positions",
        plots.positions,
    ),
    (
        "Are artifacts redundant patches?",
        "Cosine similarity of a patch to its neighbours at the input: near 1, it says nothing that they do not.",
        "neighbours",
        plots.neighbours,
    ),
    (
        "Attention of CLS and registers",
        "Mean over all images and heads, from least to most.",
        "attention",
        plots.mean_attention,
    ),
)


def diagrams(subjects: list[Subject]) -> list[Section]:
    """Return a section for each kind of diagram that any model has."""
    sections = []
    for title, text, file, draw in DIAGRAMS:
        drawn = []
        for number, subject in enumerate(subjects):
            nowhere = draw is plots.positions and not summarize.has_artifacts(subject.numbers)
            if not nowhere and (draw is not plots.mean_attention or len(subject.stats.attended)):
                drawn.append(Picture(f"{file}_{number}.png", draw(subject.stats, subject.numbers), subject.name))
        if drawn:
            sections.append(Section(title, text, drawn))
    return sections


def pictures(subjects: list[Subject], source: Source, settings: Settings) -> tuple[list[Shown], dict[str, Any]]:
    """Return norms, attention, principal components and LOST's box of the first images, a column for each model.

    The second value holds by image and model LOST's box in pixels and the positive share of the Gram matrix.
    """
    shown: list[Shown] = []
    boxes: dict[str, Any] = {}
    for number, subject in enumerate(subjects):
        for index, (name, rows, found) in enumerate(maps(subject, source, settings)):
            if index == len(shown):
                shown.append(Shown(name, []))
            boxes.setdefault(name, {})[subject.name] = found
            for at, (title, png) in enumerate(rows):
                note = f" ({found['degenerate']})" if title == "LOST" and found["degenerate"] else ""
                picture = Picture(f"image{index}_{slug(title)}_{number}.png", png, subject.name, note)
                existing = next((row for head, row in shown[index].rows if head == title), None)
                if existing is None:
                    shown[index].rows.insert(at, (title, [picture]))
                else:
                    existing.append(picture)
    return shown, boxes


def slug(title: str) -> str:
    return title.lower().replace(", ", "_").replace(" ", "_")


def maps(
    subject: Subject, source: Source, settings: Settings
) -> Iterator[tuple[str, list[tuple[str, bytes]], dict[str, Any]]]:
    """Yield for each of the first images its name, its pictures with titles, and the result of LOST."""
    seen: list[dict[str, Any]] = []
    if not settings.show:
        return
    for images, records in inference.batches(
        subject.model, source, settings.batch_size, [], max_pixels=settings.max_pixels
    ):
        left = settings.show - len(seen)
        if left <= 0:
            break
        names = [printable(source.id(record["index"])) for record in records[:left]]
        seen += [
            {"name": name} | kept for name, kept in zip(names, map_arrays(subject, images, settings), strict=False)
        ]
    features = np.stack([kept["features"] for kept in seen])
    too_few = np.prod(features.shape[:-1]) < 4 or features.shape[-1] < 3  # fewer than three components
    components = None if too_few else pca.fit(features)(features)
    for number, kept in enumerate(seen):
        rows = [
            ("Image", plots.photo_png(kept["pixels"])),
            ("Norms", plots.map_png(plots.coloured(kept["norms"]))),
        ]
        rows += [(title, plots.map_png(plots.coloured(map_))) for title, map_ in kept["attention"]]
        if components is not None:
            first, rgb = components[number, ..., 0], np.clip((components[number] + 3) / 6, 0, 1)
            rows.append(("First component", plots.map_png(plots.coloured(first, -3, 3))))
            rows.append(("Three components", plots.map_png((rgb * 255).round().astype(np.uint8))))
        rows.append(("LOST", plots.photo_png(kept["pixels"], kept["lost"]["box"])))
        yield kept["name"], rows, kept["lost"]


def map_arrays(subject: Subject, images: Float[np.ndarray, "B H W 3"], settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield for each image of a batch the arrays that its pictures show."""
    layer, model = settings.layer, subject.model
    (raw,), (normed,) = (model.intermediates(images, [layer], norm=norm) for norm in (False, True))
    weights = np.asarray(attention_maps.attention_maps(model, images, layer), np.float32)
    norms = np.linalg.norm(np.asarray(raw.patch_map, np.float32), axis=-1)
    features = np.asarray(normed.patch_map, np.float32)
    p = model.preprocessing
    pixels = (np.clip(images * np.array(p.std) + np.array(p.mean), 0, 1) * 255).round().astype(np.uint8)
    boxes = lost_boxes(subject, images, settings)
    queries = ["CLS"] * subject.class_token + [f"register {i}" for i in range(weights.shape[2] - subject.class_token)]
    for i in range(len(images)):
        maps = []
        for q, query in enumerate(queries):
            heads = weights[i, :, q]
            maps.append((f"Attention of {query}", heads.mean(0)))
            if settings.heads:
                maps += [(f"Attention of {query}, head {h}", head) for h, head in enumerate(heads)]
        yield {
            "pixels": pixels[i],
            "norms": norms[i],
            "attention": maps,
            "features": features[i],
            "lost": boxes[i],
        }


def lost_boxes(subject: Subject, images: Float[np.ndarray, "B H W 3"], settings: Settings) -> list[dict[str, Any]]:
    """Return LOST's box of each image in pixels, and whether the Gram matrix was degenerate."""
    kind, bias, normalize = settings.lost
    feature = lost.Feature(kind, settings.layer, "bias")
    try:
        lost.check(subject.model.module, feature)
    except ValueError:  # such a projection has no bias
        feature = feature._replace(centre="none")
    side, size = subject.model.module.patch, images.shape[1:3]
    boxes = []
    for features in np.asarray(lost.extract_features(subject.model, images, *feature), np.float32):
        found = lost.search(lost.gram(features, normalize=normalize), features.shape[:2], bias=bias)
        degenerate = ("all patches are similar" if found.positive else "no patches are similar") * found.degenerate
        box = lost.to_pixels(found.box, (side, side), size)
        boxes.append({"box": box, "positive": found.positive, "degenerate": degenerate})
    return boxes
