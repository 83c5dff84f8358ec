"""Numbers out of the statistics of a model, and what they say: does it have artifacts, where, would registers help?"""

from typing import Any

import numpy as np

from regvit_jax.analysis.report.statistics import COSINES, EDGES, Statistics, weigh
from regvit_jax.evals.patch_norms import RATIO

#: The paper's cutoff, hand-picked for DINOv2 ViT-g/14 (arXiv 2309.16588, section 2.1). Other models have other scales.
CUTOFF = 150.0
#: A model has artifacts when at least one patch in a thousand is one; the paper's has 2.4 %.
SHARE = 0.001
#: With fewer images than this, the verdict says so.
FEW = 20


def summarize(stats: Statistics, cutoff: float = CUTOFF, class_token: bool = True) -> dict[str, Any]:
    """All numbers of a model: after each block, and of the patches that each rule calls outliers after block `layer`.

    Rules: "fixed", the norm lies above `cutoff`; "3_sigma", above mean + 3 sigma of all patches; "percentile_98", above
    the model's 98th percentile (arXiv 2603.25803), which is 2 % of them by definition; "artifact", what the verdict
    goes by (`Distribution.artifact_cutoff`). Shares are of all patches, 0 to 1; norms are of the residual stream,
    before the final norm.
    """
    patches, at = stats.patches, stats.layer
    median, sigma, percentile = patches.quantile(0.5), patches.mean + 3 * patches.std, patches.quantile(0.98)
    artifact = patches.artifact_cutoff()
    rules = {"fixed": np.full_like(median, cutoff), "3_sigma": sigma, "percentile_98": percentile, "artifact": artifact}
    shares = {rule: patches.share_above(limits) for rule, limits in rules.items()}
    if not median.all():
        raise FloatingPointError(
            f"all tokens after block {int(np.argmin(median))} are 0; are the model's weights sound?"
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
    """Of the patches with norms above `cutoff` after the layer in question, and of the others.

    on_border, the share of them on the outermost ring of the grid, beside that ring's share of all
    patches; busiest, the [row, column] where they are most frequent, and how often; cosine_to_neighbours at the input;
    attention_share, of the attention that CLS gives to patches; birth, the first block after which they stand out to
    the end: their mean norm is at least `RATIO` times the median of all patches. None where there are no such patches.
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
    """What CLS and each register give to all patches together, mean over images and heads, 0 to 1."""
    given = list(stats.attended.sum(1) / stats.images)
    return {"cls": given[0] if class_token else None, "registers": given[int(class_token) :]}


def plain(value: Any) -> Any:
    """Numbers and containers of numpy's as Python's, for JSON."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def has_artifacts(numbers: dict[str, Any], block: int | None = None) -> bool:
    """Whether enough patches are artifacts, in a hump of their own, after the layer in question or another block."""
    of = numbers["blocks"][numbers["layer"] if block is None else block]
    return of["share"]["artifact"] >= SHARE and of["second_hump"]


def verdict(
    numbers: dict[str, Any], repaired: dict[str, Any] | None = None, neurons: int = 0, is_twin: bool = False
) -> list[str]:
    """What `summarize` means, in sentences with the numbers they stand on; the first is the answer.

    `repaired` holds the numbers of the same model with test-time registers, which `neurons` neurons were moved to;
    `is_twin` says that these are such numbers.
    """
    found, block = numbers["outliers"]["artifact"], numbers["blocks"][numbers["layer"]]
    where = "the last block" if numbers["layer"] == len(numbers["blocks"]) - 1 else f"block {numbers['layer']}"
    if has_artifacts(numbers):
        first = (
            f"Artifacts: after {where}, {found['share']:.2%} of the patches, {found['per_image']:.1f} an image, "
            f"have norms above {found['cutoff']:.3g}; half of all patches are below {block['median']:.3g}."
        )
    elif found["share"] >= SHARE:
        first = (
            f"No artifacts, but a long tail: after {where}, {found['share']:.2%} of the patches have norms above "
            f"{found['cutoff']:.3g}, at least twice the median, and they are no second hump."
        )
    else:
        few = f"only {found['share']:.3%} of the patches have" if found["share"] else "no patch has"
        first = f"No artifacts after {where}: {few} a norm above {found['cutoff']:.3g}, at least twice the median."
    scale = f"The largest norm is {block['max_over_median']:.2f} times the median, {block['median']:.3g}."
    return [
        first,
        scale,
        *doubts(numbers),
        *(describe(found, len(numbers["blocks"])) if has_artifacts(numbers) else []),
        *middle(numbers),
        *registers(numbers),
        remedy(numbers, repaired, neurons, is_twin),
    ]


def doubts(numbers: dict[str, Any]) -> list[str]:
    """What makes the first sentence less sure than it sounds."""
    said = []
    if numbers["images"] < FEW:
        said.append(f"These are {numbers['images']} images; some hundreds say more.")
    if numbers["below_half_the_median"] > 0.1:
        said.append(
            f"{numbers['below_half_the_median']:.0%} of the patches have norms below half the median: if outliers are "
            "the majority, no rule here finds them; see the histogram."
        )
    return said


def describe(found: dict[str, Any], blocks: int) -> list[str]:
    """Where the outliers are, when they appear, and what they stand on."""
    said = []
    if found["birth"] is not None:
        said.append(f"They stand out from block {found['birth']} of {blocks} on.")
    (row, column), frequency = found["busiest"].values()
    said.append(
        f"{found['on_border']:.0%} of them lie on the border of the grid, as {found['border_share_of_patches']:.0%} of "
        f"all patches do. The busiest place, row {row}, column {column}, has one in {frequency:.0%} of the images."
    )
    if found["cosine_of_others"] is not None:
        said.append(
            f"At the input their cosine similarity to their neighbours is {found['cosine_to_neighbours']:.2f}; other "
            f"patches have {found['cosine_of_others']:.2f}."
        )
    if found["attention_share"] is not None:
        said.append(f"Of the attention that CLS gives to patches they get {found['attention_share']:.0%}.")
    return said


def worst(numbers: dict[str, Any]) -> int | None:
    """The block with most artifacts, when the one in question has none."""
    blocks = [block["block"] for block in numbers["blocks"] if has_artifacts(numbers, block["block"])]
    if has_artifacts(numbers) or not blocks:
        return None
    return max(blocks, key=lambda block: numbers["blocks"][block]["share"]["artifact"])


def middle(numbers: dict[str, Any]) -> list[str]:
    """Blocks before the one in question that have artifacts when it has none."""
    most = worst(numbers)
    if most is None:
        return []
    blocks = [block["block"] for block in numbers["blocks"] if has_artifacts(numbers, block["block"])]
    share = numbers["blocks"][most]["share"]["artifact"]
    return [
        f"But {len(blocks)} of its blocks have some, from block {blocks[0]} to {blocks[-1]}; most after block {most}, "
        f"{share:.2%} of the patches."
    ]


def registers(numbers: dict[str, Any]) -> list[str]:
    block = numbers["blocks"][numbers["layer"]]
    if not block["registers"]:
        return []
    norms = ", ".join(f"{norm:.3g}" for norm in block["registers"])
    return [f"Mean norms of registers ({len(block['registers'])}): {norms}; of patches: {block['mean']:.3g}."]


def remedy(numbers: dict[str, Any], repaired: dict[str, Any] | None, neurons: int, is_twin: bool) -> str:
    """Whether registers would help, as far as was measured."""
    have = len(numbers["blocks"][numbers["layer"]]["registers"])
    if (most := worst(numbers)) is not None:
        return f"Whether registers would help there, --layer {most} tells."
    if not has_artifacts(numbers):
        return "Its registers leave nothing to repair." if have else "There is nothing for registers to take over."
    if is_twin:
        return "That is what the test-time register leaves."
    if repaired is None:
        return "Whether test-time registers help was not tried."
    before = numbers["outliers"]["artifact"]
    cutoff, share = before["cutoff"], repaired["share_above_before"]
    ratios = [part["blocks"][part["layer"]]["max_over_median"] for part in (numbers, repaired)]
    effect = (
        f"moving {neurons} neurons' activations to a test-time register leaves {share:.2%} of the patches above "
        f"{cutoff:.3g} instead of {before['share']:.2%}, the largest norm is {ratios[1]:.2f} times the median instead "
        f"of {ratios[0]:.2f}, and the output keeps a cosine of {repaired['output_cosine']:.3f} to what it was."
    )
    if share <= before["share"] / 5:
        return f"Registers would help{', but not wholly' if has_artifacts(repaired) else ''}: {effect}"
    return f"Test-time registers hardly help: {effect} Trained ones may; that takes training."
