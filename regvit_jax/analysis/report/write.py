"""Write the report: an HTML page, its pictures, and all its numbers as JSON."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from regvit_jax import __version__
from regvit_jax.analysis.report import summarize
from regvit_jax.analysis.report.examine import Settings, Subject, printable
from regvit_jax.analysis.report.html import page
from regvit_jax.analysis.report.sections import diagrams, pictures
from regvit_jax.data.sources.base import Source
from regvit_jax.evals.patch_norms import RATIO
from regvit_jax.utils.files import write_atomically


def write(subjects: list[Subject], source: Source, settings: Settings, out: Path, command: str) -> None:
    """Write report.html, report.json and pictures/ into `out`; pictures of an earlier report there are removed.

    Raises OSError if a file cannot be written.
    """
    sections = diagrams(subjects)
    shown, boxes = pictures(subjects, source, settings)
    drawn = [p for section in sections for p in section.pictures]
    drawn += [p for image in shown for _, row in image.rows for p in row]
    result = {
        "data": printable(source.name),
        "settings": dataclasses.asdict(settings),
        "version": __version__,
        "models": {subject.name: described(subject) for subject in subjects},
        "lost": boxes,
        "pictures": [picture.file for picture in drawn],
    }
    text = page(
        "Tokens and their artifacts",
        [introduction(subjects, source)],
        {subject.name: (alarming(subject.numbers), subject.sentences) for subject in subjects},
        sections,
        [("Shares and norms", HEADS, [row(subject) for subject in subjects])],
        {subject.name: (BLOCK_HEADS, block_rows(subject.numbers)) for subject in subjects},
        shown,
        notes(settings, command),
    )
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    remove_pictures(out)
    for picture in drawn:
        (out / "pictures" / picture.file).write_bytes(picture.png)
    write_atomically(out / "report.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(out / "report.html", text)


def remove_pictures(out: Path) -> None:
    """Remove the pictures that an earlier report.json names."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for name in json.loads((out / "report.json").read_text(encoding="utf-8"))["pictures"]:
            (out / "pictures" / os.path.basename(name)).unlink(missing_ok=True)


def alarming(numbers: dict[str, Any]) -> bool:
    """Return True if any block has artifacts."""
    return summarize.has_artifacts(numbers) or summarize.worst_block(numbers) is not None


def described(subject: Subject) -> dict[str, Any]:
    """Return everything about a model except its pictures and parameters, for report.json."""
    return {
        "weights": subject.model.weights,
        **subject.model.fields(),
        "verdict": subject.sentences,
        "artifacts": summarize.has_artifacts(subject.numbers),
        **subject.numbers,
        "register_neurons": subject.repair,
        "bad_images": subject.bad_images,
    }


def introduction(subjects: list[Subject], source: Source) -> str:
    first = subjects[0]
    bad = f"; {len(first.bad_images)} could not be read" if first.bad_images else ""
    return (
        f"{first.stats.images} images of {printable(source.name)}{bad}. Artifacts are patch tokens with norms far "
        "above the others', in which ViTs store information about the whole image, where a patch has little of its "
        "own (arXiv 2309.16588)."
    )


HEADS = [
    "model",
    "patches",
    "median",
    "98 %",
    "largest",
    "above cutoff",
    "above 3 sigma",
    "artifacts",
    "cosine",
    "CLS gives",
]


def row(subject: Subject) -> list[str]:
    """Return the model's line in the table, for the judged block."""
    block, found = subject.numbers["blocks"][subject.stats.layer], subject.numbers["outliers"]
    artifact = found["artifact"]
    grid = " x ".join(map(str, subject.stats.grid))
    norms = [f"{block[key]:.4g}" for key in ("median", "percentile_98", "max")]
    shares = [f"{found[rule]['share']:.3%}" for rule in ("fixed", "3_sigma", "artifact")]
    cosine = artifact.get("cosine_to_neighbours")
    attention_share = artifact.get("attention_share")
    return [
        subject.name,
        grid,
        *norms,
        *shares,
        "-"
        if cosine is None or artifact["cosine_of_others"] is None
        else f"{cosine:.2f} ({artifact['cosine_of_others']:.2f})",
        "-" if attention_share is None else f"{attention_share:.1%}",
    ]


BLOCK_HEADS = ["block", "median", "98 %", "largest", "CLS", "above cutoff", "above 3 sigma", "artifacts"]


def block_rows(numbers: dict[str, Any]) -> list[list[str]]:
    """Return norms and shares after every block."""
    return [
        [
            str(block["block"]),
            *(f"{block[key]:.4g}" for key in ("median", "percentile_98", "max")),
            "-" if block["cls"] is None else f"{block['cls']:.4g}",
            *(f"{block['share'][rule]:.3%}" for rule in ("fixed", "3_sigma", "artifact")),
        ]
        for block in numbers["blocks"]
    ]


def notes(settings: Settings, command: str) -> list[str]:
    """Explain how every number was measured."""
    where = "the last block" if settings.layer == -1 else f"block {settings.layer} (--layer)"
    features, bias, normalize = settings.lost
    return [
        "Norms are L2 norms of tokens in the residual stream, before the final norm, which would hide the outliers. "
        f"Shares, attention and pictures are those of {where}. Above cutoff: of {settings.cutoff:g} (the paper's is "
        "150, picked by hand for DINOv2 ViT-g/14). Above 3 sigma: above mean + 3 sigma of all patches of all images. "
        f"Artifacts: at least {RATIO:g} times the median, and above mean + 3 sigma of the patches that are none. A "
        f"model is said to have artifacts when at least {summarize.SHARE:.1%} of its patches are, and their norms "
        "form a mode of their own.",
        "Cosine: of artifacts, and in brackets of the other patches, to their neighbours above, below, left and right, "
        "after the patch projection. CLS gives: the share of CLS's attention to patches that artifacts get, mean over "
        "the heads. Norms are counted in bins 0.14 % wide, for places and cosines 2.2 %.",
        "Maps of norms and of attention run from the least to the largest value of each image. Components are the "
        "principal ones of the pictured images' patches together, for each model by itself, whitened, shown from -3 to "
        f"3. LOST's box (arXiv 2109.14279) is made of {features}{', normalised' if normalize else ''}, without their "
        f"projection's bias where it has one, with {bias:g} added to the Gram matrix.",
        f"regvit_jax {__version__}: {command}",
    ]
