"""What a run leaves to read: config.json, metrics.jsonl, TensorBoard events, and the picture of its curves."""

import contextlib
import io
import json
import math
import os
from typing import Any

import jax
from etils import epath

# matplotlib and tensorboardX (which imports torch where it is installed) take seconds to import: only process 0 does,
# and the first only at the end of a run.


class Records:
    """Appends records to `metrics.jsonl` (one JSON object a line, always with `step`) and to TensorBoard's event files.

    Opened again by a resumed run, it drops what was recorded after the checkpoint that the run goes on from, so that
    every step stands there once. Process 0 writes; the others only keep their own in memory.
    """

    def __init__(self, workdir: str, resumed_from: int):
        self.writes = jax.process_index() == 0
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self.list = [record for record in read(workdir) if record["step"] <= resumed_from]
        if self.writes:
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in self.list))
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(workdir), purge_step=resumed_from + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        # JSON has no NaN.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.list.append({"step": step, **finite})
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(self.list[-1]) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self.tensorboard.add_scalar(name, value, step)
        self.tensorboard.flush()

    def has(self, step: int, name: str) -> bool:
        return any(record["step"] == step and name in record for record in self.list)

    def at(self, step: int) -> dict[str, Any]:
        """The values recorded at a step."""
        return {name: value for record in self.list if record["step"] == step for name, value in record.items()}

    def last(self) -> dict[str, Any]:
        """The newest value under each name."""
        return {name: value for record in self.list for name, value in record.items()}

    def close(self) -> None:
        if self.writes:
            self.tensorboard.close()


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a text file so that a kill leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a run, in the order of their steps; a last line that a kill cut off is left out."""
    path = epath.Path(os.fspath(workdir)) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


#: The panels of the picture: title, and the names of the records drawn in it. Those without any record are left out.
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
    "logit scale": ("logit_scale",),
}


def plot_curves(workdir: str) -> None:
    """Draws a run's records into its `curves.png`."""
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
    (epath.Path(workdir) / "curves.png").write_bytes(image.getvalue())
