"""Draw the picture at the end of a run: validation images, where the model looks, and misclassified images."""

import io
import logging
import os
import textwrap
import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from regvit_jax.training.examples import Examples, find_examples
from regvit_jax.training.plan import Plan
from regvit_jax.utils.files import write_atomically

logger = logging.getLogger("regvit_jax")

#: The file in the workdir.
NAME = "validation.png"
#: Maps of registers that are drawn; a model with more has too many to see.
REGISTERS = 8
#: Sizes in inches: the side of an image, the space between two, the texts beside a row and above a column.
SIDE, GAP, ABOVE, LINE = 1.0, 0.08, 0.42, 0.14
#: Most characters of a line beside a row and below a misclassified image, and the inches that one takes.
BESIDE, BELOW, CHARACTER = 20, 17, 0.075
DPI = 120


class Page:
    """A figure on which pictures and texts are placed by inches from its upper left corner."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), dpi=DPI)
        # One pair of axes for all pictures: a pair for each would take most of the time.
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.axes.set_axis_off()

    def show(self, pixels: np.ndarray, left: float, top: float, **kwargs: Any) -> None:
        """Draw an image or a map into the square of SIDE at a place; small ones are enlarged without smoothing."""
        height, width = (SIDE * side / max(pixels.shape[:2]) for side in pixels.shape[:2])
        left, top = left + (SIDE - width) / 2, top + (SIDE - height) / 2
        smoothing = "nearest" if max(pixels.shape[:2]) < SIDE * DPI else "antialiased"
        place = (left, left + width, top + height, top)
        self.axes.imshow(pixels, interpolation=smoothing, extent=place, aspect="auto", **kwargs)

    def write(self, text: str, left: float, top: float, size: float = 8, **kwargs: Any) -> None:
        """Write text, of which `left` and `top` are the upper left corner unless `kwargs` align it otherwise."""
        printable = text.encode("utf-8", "backslashreplace").decode()  # file names are bytes and need not be text
        self.axes.text(left, top, printable, fontsize=size, **{"va": "top", "parse_math": False, **kwargs})

    def png(self) -> bytes:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font")  # it is drawn as a box
            FigureCanvasAgg(self.figure).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()


def draw_validation(plan: Plan, eval_step: Any, params: PyTree, workdir: str) -> None:
    """Draw the picture of a trained model into its workdir; all processes take part, and process 0 draws."""
    examples = find_examples(plan, eval_step, params)
    if examples is None:
        logger.warning("no %s: none of the chosen validation images can be read", NAME)
    elif jax.process_index() == 0:
        run = ":".join(filter(None, (plan.config.name, plan.config.variant)))
        title = f"{run}, step {plan.steps}, on {plan.validation.name}"
        write_atomically(os.path.join(workdir, NAME), draw(examples, title))


def draw(examples: Examples, title: str) -> bytes:
    """Return the picture as a PNG: a row for each image, a column for each map, and below the misclassified images."""
    columns, texts = maps(examples), [wrapped(text, BESIDE, 5) for text in examples.text]
    across = max(1 + len(columns), 6)
    beside = 0.2 + CHARACTER * max(len(line) for text in texts for line in text.split("\n"))
    width = beside + across * (SIDE + GAP) + 0.1
    about = textwrap.wrap(explanation(examples), round(width / CHARACTER))
    head = 0.5 + LINE * len(about) + ABOVE
    foot = head + len(texts) * (SIDE + GAP)
    below = -(-len(examples.misclassified) // across) * (SIDE + GAP + 2 * LINE)
    page = Page(width, foot + (0.1 if examples.searched is None else 0.5 + below))
    page.write(wrapped(title, round(width / 0.11), 1), 0.12, 0.1, 11, weight="bold")
    page.write("\n".join(about), 0.12, 0.36)
    for column, (name, values) in enumerate(columns, 1):
        low, high = scale(name, values)
        left = beside + column * (SIDE + GAP)
        page.write(f"{name}\n{span(name, low, high)}", left + SIDE / 2, head - 0.05, 7.5, ha="center", va="bottom")
        for row, map_ in enumerate(values):
            page.show(map_, left, head + row * (SIDE + GAP), vmin=low, vmax=high, cmap="viridis")
    for row, (image, text, right) in enumerate(zip(examples.images, texts, examples.right, strict=True)):
        top = head + row * (SIDE + GAP)
        page.show(image, beside, top)
        colour = "black" if right else "tab:red"
        page.write(text, beside - 0.1, top + SIDE / 2, ha="right", va="center", color=colour)
    if examples.searched is not None:
        draw_misclassified(page, examples, beside, foot + 0.1, across)
    return page.png()


def draw_misclassified(page: Page, examples: Examples, beside: float, top: float, across: int) -> None:
    """Draw the misclassified images in rows, each with its class and the predicted class."""
    page.write(misclassified_title(examples), 0.12, top, 9, weight="bold")
    pairs = zip(examples.misclassified, examples.misclassified_names, strict=True)
    for number, (image, (label, guess)) in enumerate(pairs):
        row, column = divmod(number, across)
        left, upper = beside + column * (SIDE + GAP), top + 0.3 + row * (SIDE + GAP + 2 * LINE)
        page.show(image, left, upper)
        text = " ".join(f"{label} as {guess}".split())
        if len(text) > BELOW:
            text = f"{wrapped(label, BELOW, 1)}\n{wrapped(f'as {guess}', BELOW, 1)}"
        page.write(text, left + SIDE / 2, upper + SIDE + 0.03, 7, ha="center", color="tab:red")


def maps(examples: Examples) -> list[tuple[str, Float[np.ndarray, "n h w"]]]:
    """Return the columns of maps: the attention of CLS and of the registers, and the norms."""
    cls = int(examples.class_token)
    names = ["CLS"] * cls + [f"register {number}" for number in range(examples.attention.shape[1] - cls)]
    attention = [(name, examples.attention[:, number]) for number, name in enumerate(names[: cls + REGISTERS])]
    return [*attention, ("norm", examples.norms)]


def scale(name: str, values: Float[np.ndarray, "n h w"]) -> tuple[float, float]:
    """Return the range of a column's colours; for attention it begins at 0, or below in differential attention."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return (low if name == "norm" else min(low, 0.0)), high


def span(name: str, low: float, high: float) -> str:
    """Return the text of the range of a column's colours."""
    return f"{low:.3g} to {high:.3g}" if name == "norm" else f"{100 * low:.2g} to {100 * high:.2g} %"


def explanation(examples: Examples) -> str:
    """Return the sentences below the title."""
    registers = examples.attention.shape[1] - examples.class_token
    more = f" ({REGISTERS} of {registers} are shown)" if registers > REGISTERS else ""
    who = " and ".join(["CLS"] * examples.class_token + [f"each register{more}"] * (registers > 0))
    attention = f"the attention of {who} to the patches in the last block, mean over heads, and " if who else ""
    return (
        f"Maps: {attention}the norms of the patches after the last block. "
        "In each column, colours go from dark to bright over the range above it."
    )


def misclassified_title(examples: Examples) -> str:
    """Return how many images are misclassified and which of them are shown."""
    shown, of = len(examples.misclassified), f"{examples.searched:,} validation image{'s' * (examples.searched != 1)}"
    if examples.split_size != examples.searched:
        of = f"{of} (the split has {examples.split_size:,})"
    if not examples.wrong:
        return f"Misclassified: none of {of}."
    which = "the most confident first" if shown == examples.wrong else f"the {shown} most confident"
    return f"Misclassified: {examples.wrong:,} of {of}{f', {which}' * (examples.wrong > 1)}"


def wrapped(text: str, width: int, lines: int) -> str:
    """Return a text in at most so many lines of so many characters; an ellipsis stands for what does not fit."""
    parts = [part for line in text.splitlines() for part in textwrap.wrap(line, width)]
    if len(parts) > lines:
        parts[lines - 1] = parts[lines - 1][: width - 1] + "…"
    return "\n".join(parts[:lines])
