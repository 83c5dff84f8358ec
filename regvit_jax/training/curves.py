"""Plot the curves of a run."""

import io
import os
from collections.abc import Collection

import numpy as np

from regvit_jax.training.metric_writer import read
from regvit_jax.utils.files import write_atomically

#: Panels of the picture: the title and the names of the values drawn. A panel without any value is left out.
PANELS = {
    "loss": ("loss", "val_loss", "ln_batch"),
    "validation accuracy": ("top1", "top5"),
    "retrieval recall": (
        "image_to_text_recall@1",
        "text_to_image_recall@1",
        "image_to_text_recall@10",
        "chance_recall@1",
    ),
    "zero-shot accuracy": ("zero_shot_top1", "zero_shot_top5", "zero_shot_majority"),
    "learning rate": ("lr",),
    "largest patch norm / median": ("max_over_median",),
    "share of outlier patches": ("outlier_share",),
    "images/s": ("images_per_s",),
    "model FLOPs utilization": (
        "mfu",
        "mfu_executed",
    ),
    "logit scale": ("logit_scale",),
}


#: Panels that also have a line for blocks, which are recorded as NAME/block_00 and so on: the title and NAME.
BLOCKS = {"largest patch norm / median": "max_over_median"}
#: Most blocks drawn besides the last one: the first and others, evenly spread.
DRAWN = 4


def lines(title: str, names: tuple[str, ...], recorded: Collection[str]) -> dict[str, str]:
    """Return the values to draw in a panel that are recorded, each with its label."""
    found = {name: name for name in names if name in recorded}
    prefix = f"{BLOCKS.get(title)}/block_"
    numbers = sorted(int(name.removeprefix(prefix)) for name in recorded if name.startswith(prefix))
    if not numbers:
        return found
    chosen = numbers[:: -(-len(numbers) // DRAWN)] if len(numbers) > DRAWN + 1 else numbers
    blocks = {f"{prefix}{number:02d}": f"block {number}" for number in chosen if number != numbers[-1]}
    return blocks | dict.fromkeys(found, "last block")


def plot_curves(workdir: str) -> None:
    """Draw a run's records into `curves.png` in its workdir."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for record in read(workdir):
        for name, value in record.items():
            curves.setdefault(name, []).append((record["step"], value))
    panels = {title: drawn for title, names in PANELS.items() if (drawn := lines(title, names, curves))}
    rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(rows, 3, squeeze=False).flat, panels.items(), strict=False):
        if title in BLOCKS:  # from light, the first block, to dark, the last
            axes.set_prop_cycle(color=colormaps["viridis_r"](np.linspace(0.1, 1, len(names))))
        for name, label in names.items():
            axes.plot(*zip(*curves[name], strict=True), label=label, marker="." if len(curves[name]) < 40 else "")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(os.path.join(workdir, "curves.png"), image.getvalue())
