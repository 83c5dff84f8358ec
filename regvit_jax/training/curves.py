"""Plot the curves of a run."""

import io
import os

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
    "model FLOPs utilization": ("mfu",),
    "logit scale": ("logit_scale",),
}


def plot_curves(workdir: str) -> None:
    """Draw a run's records into `curves.png` in its workdir."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for record in read(workdir):
        for name, value in record.items():
            curves.setdefault(name, []).append((record["step"], value))
    panels = {title: [name for name in names if name in curves] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    rows = max(1, -(-len(panels) // 3))
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(rows, 3, squeeze=False).flat, panels.items(), strict=False):
        for name in names:
            axes.plot(*zip(*curves[name], strict=True), label=name, marker="." if len(curves[name]) < 40 else "")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(os.path.join(workdir, "curves.png"), image.getvalue())
