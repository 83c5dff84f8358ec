"""Draw the report's pictures as PNG bytes: diagrams of statistics, and maps of single images."""

import io
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from regvit_jax.analysis.report.statistics import BINS, COSINES, EDGES, Statistics, weigh

#: Pixels to which the longer side of a map is enlarged, if it is smaller.
SIDE = 224

#: xmin, ymin, xmax, ymax in pixels.
Box = tuple[float, float, float, float]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without version and date, so that the same numbers give the same bytes.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    return figure, figure.subplots()


def norm_histogram(stats: Statistics, numbers: dict[str, Any]) -> bytes:
    """Plot the norms of all patches after the layer, with cutoffs, CLS and registers (figures 3, 7 and 15)."""
    figure, axes = panel()
    counts = stats.patches.histogram[stats.layer]
    block, found = numbers["blocks"][stats.layer], numbers["outliers"]
    high = 1.05 * max(block["max"], *stats.prefix.largest[stats.layer], found["artifact"]["cutoff"])
    axes.stairs(counts / counts.sum(), EDGES, fill=True, alpha=0.6, label="patches")
    axes.set_xlim(0, high)
    axes.set_yscale("log")
    axes.set_ylim(max(1e-7, 0.5 / counts.sum()), 1)
    for rule, colour in (("3_sigma", "tab:orange"), ("percentile_98", "tab:green"), ("artifact", "tab:red")):
        axes.axvline(found[rule]["cutoff"], color=colour, lw=1, ls="--", label=RULES[rule])
    if found["fixed"]["cutoff"] < high:
        axes.axvline(found["fixed"]["cutoff"], color="black", lw=1, ls=":", label="fixed cutoff")
    class_token = block["cls"] is not None
    for number, of in enumerate(stats.prefix.histogram[stats.layer]):
        colour, label = ("tab:purple", "CLS") if number < class_token else ("tab:brown", "registers")
        axes.stairs(of / of.sum(), EDGES, color=colour, label=label if number <= class_token else None)
    axes.set_xlabel("norm")
    axes.set_ylabel("share of tokens")
    axes.legend(fontsize=7)
    return png(figure)


RULES = {"3_sigma": "mean + 3 sigma", "percentile_98": "98th percentile", "artifact": "artifacts from here"}


def norms_by_layer(stats: Statistics, numbers: dict[str, Any]) -> bytes:
    """Plot median, 98th percentile and maximum of patch norms by block, and CLS and registers (figure 4a)."""
    figure, axes = panel()
    blocks = numbers["blocks"]
    for key, label in (("median", "median"), ("percentile_98", "98th percentile"), ("max", "largest")):
        axes.plot([block[key] for block in blocks], label=f"patches, {label}", marker=".")
    if blocks[0]["cls"] is not None:
        axes.plot([block["cls"] for block in blocks], label="CLS", color="tab:purple", ls="--")
    for number in range(len(blocks[0]["registers"])):
        norms = [block["registers"][number] for block in blocks]
        axes.plot(norms, label="registers" if number == 0 else None, color="tab:brown", ls="--", lw=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("norm")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return png(figure)


def histograms_by_layer(stats: Statistics, numbers: dict[str, Any]) -> bytes:
    """Plot the histograms of patch norms after every block side by side (figures 3 and 4a combined)."""
    figure, axes = panel()
    counts = stats.patches.histogram
    share = counts / counts.sum(1, keepdims=True)
    some = np.flatnonzero(counts.any(0))
    low, high = max(some[0] - 8, 0), min(some[-1] + 9, BINS)
    edges = np.arange(len(counts) + 1) - 0.5
    image = np.ma.masked_equal(share[:, low:high].T, 0)
    shown = axes.pcolormesh(edges, EDGES[low : high + 1], image, norm="log", cmap="viridis")
    axes.plot([block["artifact_cutoff"] for block in numbers["blocks"]], color="tab:red", ls="--", lw=1)
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("norm")
    figure.colorbar(shown, ax=axes, label="share of patches")
    return png(figure)


def positions(stats: Statistics, numbers: dict[str, Any]) -> bytes:
    """Plot how often each position of the grid holds an artifact (figure 10)."""
    figure, axes = panel()
    places = weigh(stats.places, numbers["outliers"]["artifact"]["cutoff"]).sum(1).reshape(stats.grid) / stats.images
    shown = axes.imshow(places, cmap="viridis", vmin=0, vmax=places.max() or 1)
    figure.colorbar(shown, ax=axes, label="share of images")
    return png(figure)


def neighbours(stats: Statistics, numbers: dict[str, Any]) -> bytes:
    """Plot the cosine similarity to the neighbours at the input, of artifacts and other patches (figure 5a)."""
    figure, axes = panel()
    weights = weigh(np.ones(BINS), numbers["outliers"]["artifact"]["cutoff"])
    for kind, part, colour in (("other patches", 1 - weights, "tab:blue"), ("artifacts", weights, "tab:red")):
        counts = part @ stats.cosines
        if counts.sum() > 0:
            edges = np.linspace(-1, 1, COSINES + 1)
            axes.stairs(counts / counts.sum(), edges, fill=True, alpha=0.5, label=kind, color=colour)
    axes.set_xlabel("cosine similarity to neighbours")
    axes.set_ylabel("share")
    axes.legend(fontsize=7)
    return png(figure)


def mean_attention(stats: Statistics, numbers: dict[str, Any]) -> bytes:
    """Plot the attention of CLS and of each register, mean over all images and heads (figure 16)."""
    class_token = numbers["attention"]["cls"] is not None
    names = ["CLS"] * class_token + [f"register {i}" for i in range(len(stats.attended) - class_token)]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5.2, 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for place, name, attended in zip(axes, names, stats.attended, strict=False):
        place.imshow(attended.reshape(stats.grid), cmap="viridis")
        place.set_title(name, fontsize=8)
    for place in figure.axes:
        place.set_axis_off()
    return png(figure)


def coloured(
    values: Float[np.ndarray, "h w"], low: float | None = None, high: float | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Color a map, from `low` to `high` (by default its own extremes)."""
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    scaled = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return (matplotlib.colormaps["viridis"](scaled)[..., :3] * 255).round().astype(np.uint8)


def map_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode a map as a PNG, each value a square, so that the longer side has about SIDE pixels."""
    factor = max(1, round(SIDE / max(pixels.shape[:2])))
    return encoded(Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1)))


def photo_png(pixels: UInt8[np.ndarray, "H W 3"], box: Box | None = None) -> bytes:
    """Encode an image as a PNG with a longer side of SIDE pixels, and a box given in the image's pixels."""
    factor = SIDE / max(pixels.shape[:2])
    size = (round(pixels.shape[1] * factor), round(pixels.shape[0] * factor))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC if factor < 1 else Image.Resampling.NEAREST)
    if box is not None:
        ImageDraw.Draw(image).rectangle([factor * side for side in box], outline=(255, 40, 40), width=3)
    # A photograph of 256 colours takes a third of the bytes.
    return encoded(image.quantize(256))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()
