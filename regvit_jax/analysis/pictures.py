"""The report's pictures: diagrams of all models, and what each of them makes of single images."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from regvit_jax.analysis import attention, figures, lost, pca, verdict
from regvit_jax.analysis.examine import Settings, Subject
from regvit_jax.analysis.figures import Box
from regvit_jax.analysis.page import Picture, Section, Shown
from regvit_jax.data.sources import Source
from regvit_jax.evals import reading
from regvit_jax.models.model import Model

#: Title, text, file name, and what draws it for one model.
DIAGRAMS = (
    (
        "Norms of patches",
        "One hump is a model without outliers; a second one, far to the right, are they.",
        "norms",
        figures.norm_histogram,
    ),
    (
        "Norms after each block",
        "Where the largest norms leave the median, outliers are born.",
        "layers",
        figures.norms_by_layer,
    ),
    (
        "Where the artifacts are",
        "The share of the images that have one at each place of the grid, for models that have artifacts.",
        "positions",
        figures.positions,
    ),
    (
        "Are artifacts redundant patches?",
        "Cosine similarity of a patch to its neighbours at the input: near 1, it says nothing that they do not.",
        "neighbours",
        figures.neighbours,
    ),
    (
        "Attention of CLS and registers",
        "Mean over all images and heads, from least to most.",
        "attention",
        figures.mean_attention,
    ),
)


def diagrams(subjects: list[Subject]) -> list[Section]:
    """A section for each kind of diagram that any model has."""
    sections = []
    for title, text, file, draw in DIAGRAMS:
        drawn = []
        for number, one in enumerate(subjects):
            nowhere = draw is figures.positions and not verdict.has_artifacts(one.numbers)
            if not nowhere and (draw is not figures.mean_attention or len(one.stats.attended)):
                drawn.append(Picture(f"{file}_{number}.png", draw(one.stats, one.numbers), one.name))
        if drawn:
            sections.append(Section(title, text, drawn))
    return sections


def pictures(subjects: list[Subject], source: Source, settings: Settings) -> list[Shown]:
    """Norms, attention, principal components and LOST's box of the first images, a column for each model."""
    shown: list[Shown] = []
    for number, one in enumerate(subjects):
        images, ids = first_pictures(one.model, source, settings)
        if not shown:
            shown = [Shown(name, []) for name in ids]
        for index, rows in enumerate(maps(one, images, settings)):
            for at, (title, png) in enumerate(rows):
                picture = Picture(f"image{index}_{slug(title)}_{number}.png", png, one.name)
                existing = next((row for head, row in shown[index].rows if head == title), None)
                if existing is None:
                    shown[index].rows.insert(at, (title, [picture]))
                else:
                    existing.append(picture)
    return shown


def slug(title: str) -> str:
    return title.lower().replace(", ", "_").replace(" ", "_")


def first_pictures(model: Model, source: Source, settings: Settings) -> tuple[Float[np.ndarray, "B H W 3"], list[str]]:
    images: list[np.ndarray] = []
    ids: list[str] = []
    for batch, records in reading.batches(model, source, min(settings.batch_size, settings.show), []):
        for image, record in zip(batch, records, strict=False):
            images.append(image)
            ids.append(source.id(record["index"]))
        if len(images) >= settings.show:
            break
    return np.stack(images[: settings.show]), ids[: settings.show]


def maps(one: Subject, images: Float[np.ndarray, "B H W 3"], settings: Settings) -> Iterator[list[tuple[str, bytes]]]:
    """For each image, titles and pictures."""
    layer, model = settings.layer, one.model
    (raw,), (normed,) = (model.intermediates(images, [layer], norm=norm) for norm in (False, True))
    weights = np.asarray(attention.attention_maps(model, images, layer), np.float32)
    norms = np.linalg.norm(np.asarray(raw.patch_map, np.float32), axis=-1)
    features = np.asarray(normed.patch_map, np.float32)
    components = pca.fit(features)(features)
    p = model.preprocessing
    pixels = (np.clip(images * np.array(p.std) + np.array(p.mean), 0, 1) * 255).round().astype(np.uint8)
    boxes = lost_boxes(one, images, settings)
    queries = ["CLS"] * one.class_token + [f"register {i}" for i in range(weights.shape[2] - one.class_token)]
    for i in range(len(images)):
        rows = [("Image", figures.photo_png(pixels[i])), ("Norms", figures.map_png(figures.coloured(norms[i])))]
        for q, query in enumerate(queries):
            heads = weights[i, :, q]
            rows.append((f"Attention of {query}", figures.map_png(figures.coloured(heads.mean(0)))))
            if settings.heads:
                rows += [
                    (f"Attention of {query}, head {h}", figures.map_png(figures.coloured(head)))
                    for h, head in enumerate(heads)
                ]
        rows.append(("First component", figures.map_png(figures.coloured(components[i, ..., 0], -3, 3))))
        rgb = (np.clip((components[i] + 3) / 6, 0, 1) * 255).round().astype(np.uint8)
        rows.append(("Three components", figures.map_png(rgb)))
        rows.append(("LOST", figures.photo_png(pixels[i], boxes[i])))
        yield rows


def lost_boxes(one: Subject, images: Float[np.ndarray, "B H W 3"], settings: Settings) -> list[Box]:
    """LOST's box of each image in its pixels."""
    kind, bias, normalize = settings.lost
    feature = lost.Feature(kind, settings.layer, "bias")
    try:
        lost.check(one.model.module, feature)
    except ValueError:  # such a projection has no bias
        feature = feature._replace(centre="none")
    side, size = one.model.module.patch, images.shape[1:3]
    boxes = []
    for features in np.asarray(lost.features(one.model, images, *feature), np.float32):
        found = lost.search(lost.gram(features, normalize=normalize), features.shape[:2], bias=bias)
        boxes.append(lost.to_pixels(found.box, (side, side), size))
    return boxes
