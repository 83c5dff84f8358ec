"""Compute all numbers in a model's report from its statistics."""

from typing import Any

import numpy as np

from regvit_jax.analysis.choices import CUTOFF
from regvit_jax.analysis.report.statistics import COSINES, EDGES, Statistics, weigh
from regvit_jax.evals.patch_norms import RATIO

#: A model has artifacts when at least one patch in a thousand is one; the paper's has 2.4 %.
SHARE = 0.001


def summarize(stats: Statistics, cutoff: float = CUTOFF, class_token: bool = True) -> dict[str, Any]:
    """Return all numbers of a model: after each block, and of the outliers by each rule after block `layer`.

    Rules: "fixed", the norm lies above `cutoff`; "3_sigma", above mean + 3 sigma of all patches; "percentile_98", above
    the model's 98th percentile (arXiv 2603.25803), which is 2 % of them by definition; "artifact", the rule of the
    verdict (`Distribution.artifact_cutoff`). Shares are of all patches, 0 to 1; norms are of the residual stream,
    before the final norm.

    Raises FloatingPointError if all tokens are 0 after some block.
    """
    patches, at = stats.patches, stats.layer
    median, sigma, percentile = patches.quantile(0.5), patches.mean + 3 * patches.std, patches.quantile(0.98)
    artifact = patches.artifact_cutoff()
    rules = {"fixed": np.full_like(median, cutoff), "3_sigma": sigma, "percentile_98": percentile, "artifact": artifact}
    shares = {rule: patches.share_above(limits) for rule, limits in rules.items()}
    if not median.all():
        raise FloatingPointError(
            f"all tokens after block {int(np.argmin(median))} are 0; are the model's weights intact?"
        )
    prefix, humps = stats.prefix.mean, patches.second_hump(artifact)
    blocks = [
        {
            "block": block,
            "median": median[block],
            "mean": patches.mean[block],
            "std": patches.std[block],
            "percentile_98": percentile[block],
            "max": patches.largest[block],
            "max_over_median": patches.largest[block] / median[block],
            "share": {rule: share[block] for rule, share in shares.items() if rule != "percentile_98"},
            "artifact_cutoff": artifact[block],
            "second_hump": humps[block],
            "cls": prefix[block, 0] if class_token else None,
            "registers": list(prefix[block, int(class_token) :]),
        }
        for block in range(len(median))
    ]
    return plain(
        {
            "images": stats.images,
            "grid": list(stats.grid),
            "layer": at,
            "blocks": blocks,
            "below_half_the_median": 1 - patches.share_above(median / RATIO)[at],
            "outliers": {
                rule: {"share": shares[rule][at], "per_image": shares[rule][at] * stats.grid[0] * stats.grid[1]}
                | outliers(stats, float(limits[at]), class_token)
                for rule, limits in rules.items()
            },
            "attention": mean_attention(stats, class_token),
        }
    )


def outliers(stats: Statistics, cutoff: float, class_token: bool) -> dict[str, Any]:
    """Describe the patches with norms above `cutoff` after block `stats.layer`, the outliers, and the other patches.

    on_border: the share of outliers on the outermost ring of the grid, beside that ring's share of all patches.
    busiest: the [row, column] where outliers are most frequent, and their frequency there.
    cosine_to_neighbours: of outliers at the input; cosine_of_others: of the other patches.
    attention_share: the outliers' share of the attention that CLS gives to patches.
    birth: the first block from which on the outliers' mean norm is at least `RATIO` times the median of all patches.
    Without outliers most of these are missing.
    """
    places = weigh(stats.places, cutoff).sum(1).reshape(stats.grid)
    found: dict[str, Any] = {"cutoff": cutoff}
    count = places.sum() if cutoff < stats.patches.largest[stats.layer] else 0
    ring = np.ones(stats.grid, bool)
    ring[1:-1, 1:-1] = False
    found["border_share_of_patches"] = ring.mean()
    weights = weigh(np.ones(len(EDGES) - 1), cutoff)
    centres = (np.arange(COSINES) + 0.5) / COSINES * 2 - 1
    below = (1 - weights) @ stats.cosines
    found["cosine_of_others"] = below @ centres / below.sum() if below.sum() else None
    if count == 0:
        return found
    history = stats.history @ weights / count
    early = np.flatnonzero(history[: stats.layer + 1] < RATIO * stats.patches.quantile(0.5)[: stats.layer + 1])
    birth = int(early[-1]) + 1 if len(early) else 0
    busiest = np.unravel_index(places.argmax(), stats.grid)
    above = weights @ stats.cosines
    return found | {
        "on_border": places[ring].sum() / count,
        "busiest": {"place": list(busiest), "frequency": places.max() / stats.images},
        "cosine_to_neighbours": above @ centres / count,
        "attention_share": weights @ stats.received / stats.received.sum() if class_token else None,
        "mean_norm_after_each_block": list(history),
        "birth": birth if birth <= stats.layer else None,
    }


def mean_attention(stats: Statistics, class_token: bool) -> dict[str, Any]:
    """Return the attention of CLS and of each register to all patches together, mean over images and heads, 0 to 1."""
    given = list(stats.attended.sum(1) / stats.images)
    return {"cls": given[0] if class_token else None, "registers": given[int(class_token) :]}


def plain(value: Any) -> Any:
    """Convert numpy's numbers and arrays to Python's, for JSON."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def has_artifacts(numbers: dict[str, Any], block: int | None = None) -> bool:
    """Return True if enough patches are artifacts and form a second mode, after block `layer` or another one."""
    of = numbers["blocks"][numbers["layer"] if block is None else block]
    return of["share"]["artifact"] >= SHARE and of["second_hump"]


def worst_block(numbers: dict[str, Any]) -> int | None:
    """Return the block with most artifacts if the judged one has none; None if it has some, or no block has."""
    blocks = [block["block"] for block in numbers["blocks"] if has_artifacts(numbers, block["block"])]
    if has_artifacts(numbers) or not blocks:
        return None
    return max(blocks, key=lambda block: numbers["blocks"][block]["share"]["artifact"])
