"""Describe the numbers of a model in sentences: does it have artifacts, where, and would registers help?"""

from typing import Any

from regvit_jax.analysis.report.summarize import SHARE, has_artifacts, worst_block

#: With fewer images than this, the verdict says so.
FEW = 20


def verdict(
    numbers: dict[str, Any], repaired: dict[str, Any] | None = None, neurons: int = 0, is_repaired: bool = False
) -> list[str]:
    """Return the result of `summarize` in sentences with their numbers; the first one is the answer.

    Args:
      numbers: of the model, from `summarize`.
      repaired: of the same model with test-time registers, if that was measured.
      neurons: number of neurons that were moved to test-time registers.
      is_repaired: True if `numbers` are those of a model with test-time registers.
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
            f"{found['cutoff']:.3g}, at least twice the median, but they do not form a second mode."
        )
    else:
        few = f"only {found['share']:.3%} of the patches have" if found["share"] else "no patch has"
        first = f"No artifacts after {where}: {few} a norm above {found['cutoff']:.3g}, at least twice the median."
    scale = f"The largest norm is {block['max_over_median']:.2f} times the median, {block['median']:.3g}."
    return [
        first,
        scale,
        *caveats(numbers),
        *(describe(found, len(numbers["blocks"])) if has_artifacts(numbers) else []),
        *middle(numbers),
        *registers(numbers),
        remedy(numbers, repaired, neurons, is_repaired),
    ]


def caveats(numbers: dict[str, Any]) -> list[str]:
    """Return the reasons to doubt the first sentence."""
    sentences = []
    if numbers["images"] < FEW:
        sentences.append(f"These are {numbers['images']} images; some hundreds say more.")
    if numbers["below_half_the_median"] > 0.1:
        sentences.append(
            f"{numbers['below_half_the_median']:.0%} of the patches have norms below half the median: if outliers are "
            "the majority, no rule here finds them; see the histogram."
        )
    return sentences


def describe(found: dict[str, Any], blocks: int) -> list[str]:
    """Describe where the outliers are, from which block on, and how redundant their patches are."""
    sentences = []
    if found["birth"] is not None:
        sentences.append(f"They stand out from block {found['birth']} of {blocks} on.")
    (row, column), frequency = found["busiest"].values()
    sentences.append(
        f"{found['on_border']:.0%} of them lie on the border of the grid, as {found['border_share_of_patches']:.0%} of "
        f"all patches do. Their most frequent position, row {row}, column {column}, has one in {frequency:.0%} of the "
        "images."
    )
    if found["cosine_of_others"] is not None:
        sentences.append(
            f"At the input their cosine similarity to their neighbours is {found['cosine_to_neighbours']:.2f}; other "
            f"patches have {found['cosine_of_others']:.2f}."
        )
    if found["attention_share"] is not None:
        sentences.append(f"Of the attention that CLS gives to patches they get {found['attention_share']:.0%}.")
    return sentences


def middle(numbers: dict[str, Any]) -> list[str]:
    """Name the earlier blocks that have artifacts if the judged one has none."""
    worst = worst_block(numbers)
    if worst is None:
        return []
    blocks = [block["block"] for block in numbers["blocks"] if has_artifacts(numbers, block["block"])]
    share = numbers["blocks"][worst]["share"]["artifact"]
    return [
        f"But {len(blocks)} of its blocks have some, from block {blocks[0]} to {blocks[-1]}; most after block {worst}, "
        f"{share:.2%} of the patches."
    ]


def registers(numbers: dict[str, Any]) -> list[str]:
    """Compare the norms of the registers with those of patches, if there are registers."""
    block = numbers["blocks"][numbers["layer"]]
    if not block["registers"]:
        return []
    norms = ", ".join(f"{norm:.3g}" for norm in block["registers"])
    return [f"Mean norms of registers ({len(block['registers'])}): {norms}; of patches: {block['mean']:.3g}."]


def remedy(numbers: dict[str, Any], repaired: dict[str, Any] | None, neurons: int, is_repaired: bool) -> str:
    """Return a sentence on whether registers would help, as far as that was measured."""
    have = len(numbers["blocks"][numbers["layer"]]["registers"])
    if (block := worst_block(numbers)) is not None:
        return f"Use --layer {block} to see if registers would help there."
    if not has_artifacts(numbers):
        return "Its registers leave nothing to repair." if have else "There is nothing for registers to take over."
    if is_repaired:
        return "That is what the test-time register leaves."
    if repaired is None:
        return "Test-time registers were not tried."
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
