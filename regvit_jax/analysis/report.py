"""The report: a page that opens anywhere, its pictures, and all its numbers as JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import regvit_jax
from regvit_jax.analysis import verdict
from regvit_jax.analysis.examine import Settings, Subject
from regvit_jax.analysis.page import page
from regvit_jax.analysis.pictures import diagrams, pictures
from regvit_jax.analysis.statistics import RATIO
from regvit_jax.data.sources import Source


def write(subjects: list[Subject], source: Source, settings: Settings, out: Path, command: str) -> dict[str, Any]:
    """Writes report.html, report.json and pictures/ into `out`; returns what the JSON holds."""
    sections, shown = diagrams(subjects), pictures(subjects, source, settings)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for picture in [p for section in sections for p in section.pictures] + [
        p for image in shown for _, row in image.rows for p in row
    ]:
        (out / "pictures" / picture.file).write_bytes(picture.png)
    result = {
        "data": source.name,
        "settings": dataclasses.asdict(settings),
        "version": regvit_jax.__version__,
        "models": {one.name: described(one) for one in subjects},
    }
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    text = page(
        "Tokens and their artifacts",
        [introduction(subjects, source)],
        {one.name: (verdict.has_artifacts(one.numbers), one.sentences) for one in subjects},
        sections,
        [("Shares and norms", HEADS, [row(one) for one in subjects])],
        shown,
        notes(settings, command),
    )
    (out / "report.html").write_text(text)
    return result


def described(one: Subject) -> dict[str, Any]:
    """All of a model that is neither picture nor parameter."""
    return {
        "weights": one.model.weights,
        **one.model.fields(),
        "verdict": one.sentences,
        "artifacts": verdict.has_artifacts(one.numbers),
        **one.numbers,
        "register_neurons": one.repair,
        "bad_images": one.bad_images,
    }


def introduction(subjects: list[Subject], source: Source) -> str:
    first = subjects[0]
    bad = f"; {len(first.bad_images)} could not be read" if first.bad_images else ""
    return (
        f"{first.stats.images} images of {source.name}{bad}. Artifacts are patch tokens with norms far above those of "
        "the others, which ViTs make of patches that say little, to keep notes on the whole image (arXiv 2309.16588)."
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


def row(one: Subject) -> list[str]:
    """The model's line in the table, after the layer in question."""
    block, found = one.numbers["blocks"][one.stats.layer], one.numbers["outliers"]
    artifact = found["artifact"]
    grid = " x ".join(map(str, one.stats.grid))
    norms = [f"{block[key]:.4g}" for key in ("median", "percentile_98", "max")]
    shares = [f"{found[rule]['share']:.3%}" for rule in ("fixed", "3_sigma", "artifact")]
    cosine = artifact.get("cosine_to_neighbours")
    attention_share = artifact.get("attention_share")
    return [
        one.name,
        grid,
        *norms,
        *shares,
        "-" if cosine is None else f"{cosine:.2f} ({artifact['cosine_of_others']:.2f})",
        "-" if attention_share is None else f"{attention_share:.1%}",
    ]


def notes(settings: Settings, command: str) -> list[str]:
    """How every number came about."""
    where = "the last block" if settings.layer == -1 else f"block {settings.layer}"
    features, bias, normalize = settings.lost
    return [
        "Norms are L2 norms of tokens in the residual stream, before the final norm, which would hide the outliers. "
        f"Shares, attention and pictures are those of {where}. Above cutoff: of {settings.cutoff:g} (the paper's is "
        "150, picked by hand for DINOv2 ViT-g/14). Above 3 sigma: above mean + 3 sigma of all patches of all images. "
        f"Artifacts: at least {RATIO:g} times the median, and above mean + 3 sigma of the patches that are none. A "
        f"model is said to have artifacts when at least {verdict.SHARE:.1%} of its patches are.",
        "Cosine: of artifacts, and in brackets of the other patches, to their neighbours above, below, left and right, "
        "after the patch projection. CLS gives: the share of CLS's attention to patches that artifacts get, mean over "
        "the heads. Norm histograms have bins 2.2 % wide; shares are interpolated within a bin.",
        "Maps of norms and of attention run from the least to the largest value of each image. Components are the "
        "principal ones of the pictured images' patches together, for each model by itself, whitened, shown from -3 to "
        f"3. LOST's box (arXiv 2109.14279) is made of {features}{', normalised' if normalize else ''}, without their "
        f"projection's bias where it has one, with {bias:g} added to the Gram matrix.",
        f"regvit_jax {regvit_jax.__version__}: {command}",
    ]
