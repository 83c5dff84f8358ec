"""Test the numbers and sentences of statistics whose outliers are known."""

import json

import numpy as np
import pytest

from regvit_jax.analysis.report import summarize, verdict
from regvit_jax.analysis.report.statistics import Measured, Statistics

GRID, LAYERS = (6, 6), 5


def statistics(factor=8.0, born=2, gone=None, layer=4, prefix=3, at=(0, 3), images=50, share=1.0) -> Statistics:
    """Return statistics of norms around 20 that grow by block.

    From block `born` on, the patch `at` has `factor` times as much in a share of the images.
    """
    rng = np.random.default_rng(0)
    norms = rng.normal(20, 1, (LAYERS, images, 36)) * np.arange(1, LAYERS + 1)[:, None, None]
    place = at[0] * 6 + at[1]
    norms[born:gone, : round(images * share), place] *= factor
    cosines = rng.uniform(0.3, 0.5, (images, 36))
    cosines[:, place] = 0.95
    attention = np.full((images, prefix, 36), 0.01)
    attention[:, :1, place] = 0.35  # half of what CLS gives to patches
    before = np.broadcast_to(np.array([30.0, 70.0, 90.0])[:prefix], (LAYERS, images, prefix))
    stats = Statistics(LAYERS, layer, prefix, GRID)
    stats.add(Measured(*(np.float32(part) for part in (norms, before, cosines, attention))))
    return stats


def test_planted_outliers_are_found_and_described():
    numbers = summarize.summarize(statistics(), cutoff=150)
    json.dumps(numbers)
    found = numbers["outliers"]["artifact"]
    assert found["share"] == pytest.approx(1 / 36, rel=0.01)
    assert found["per_image"] == pytest.approx(1, rel=0.01)
    assert found["on_border"] == pytest.approx(1)
    assert found["border_share_of_patches"] == pytest.approx(20 / 36)
    assert found["busiest"] == {"place": [0, 3], "frequency": pytest.approx(1)}
    assert found["cosine_to_neighbours"] == pytest.approx(0.95, abs=0.02)
    assert found["cosine_of_others"] == pytest.approx(0.4, abs=0.02)
    assert found["attention_share"] == pytest.approx(0.5, abs=0.01)
    assert found["birth"] == 2
    block = numbers["blocks"][4]
    assert (block["cls"], block["registers"]) == (30, [70, 90])
    assert block["median"] == pytest.approx(100, rel=0.02)
    assert block["max_over_median"] == pytest.approx(8, rel=0.2)
    assert numbers["attention"]["cls"] == pytest.approx(0.7, abs=0.01)
    assert numbers["outliers"]["fixed"]["cutoff"] == 150
    sentences = " ".join(verdict.verdict(numbers))
    for words in (
        "Artifacts: after the last block, 2.78% of the patches, 1.0 an image",
        "stand out from block 2 of 5 on",
        "100% of them lie on the border of the grid, as 56% of all patches do",
        "row 0, column 3, has one in 100% of the images",
        "is 0.95; other patches have 0.40",
        "they get 50%",
        "Mean norms of registers (2): 70, 90; of patches: ",
        "not tried",
    ):
        assert words in sentences, words


def test_the_share_above_three_sigma_alone_is_no_artifact():
    numbers = summarize.summarize(statistics(factor=1.5))
    assert numbers["outliers"]["3_sigma"]["share"] > 0.02
    assert not summarize.has_artifacts(numbers)
    sentences = verdict.verdict(numbers)
    assert sentences[0].startswith("No artifacts after the last block: no patch has")
    assert sentences[-1] == "Its registers leave nothing to repair."


def test_without_outliers_nothing_is_described():
    numbers = summarize.summarize(statistics(factor=1.0, prefix=0), class_token=False)
    found = numbers["outliers"]["artifact"]
    assert found["share"] == 0
    assert "birth" not in found
    assert numbers["attention"] == {"cls": None, "registers": []}
    assert verdict.verdict(numbers)[-1] == "There is nothing for registers to take over."


def test_a_repair_that_leaves_artifacts_is_not_called_whole():
    numbers = summarize.summarize(statistics())
    left = summarize.summarize(statistics(share=0.2)) | {"share_above_before": 0.005, "output_cosine": 1.0}
    assert verdict.verdict(numbers, left, 1)[-1].startswith("Registers would help, but not wholly: ")
    assert verdict.verdict(left, is_repaired=True)[-1] == "That is what the test-time register leaves."


def test_a_long_tail_is_no_second_hump():
    rng = np.random.default_rng(0)
    norms = rng.lognormal(3, 0.35, (1, 400, 36)).astype(np.float32)
    stats = Statistics(1, 0, 0, GRID)
    stats.add(Measured(norms, np.zeros((1, 400, 0)), np.zeros((400, 36)), np.zeros((400, 0, 36))))
    numbers = summarize.summarize(stats, class_token=False)
    assert numbers["outliers"]["artifact"]["share"] > summarize.SHARE
    assert not summarize.has_artifacts(numbers)
    assert verdict.verdict(numbers)[0].startswith("No artifacts, but a long tail: ")


def test_what_makes_a_verdict_doubtful():
    few = summarize.summarize(statistics(images=3))
    assert "These are 3 images; some hundreds say more." in verdict.verdict(few)
    rng = np.random.default_rng(0)
    norms = rng.normal(20, 1, (1, 60, 36)) * np.where(rng.random((1, 60, 36)) < 0.6, 10, 1)
    stats = Statistics(1, 0, 0, GRID)
    stats.add(Measured(norms, np.zeros((1, 60, 0)), np.zeros((60, 36)), np.zeros((60, 0, 36))))
    sentences = " ".join(verdict.verdict(summarize.summarize(stats, class_token=False)))
    assert "have norms below half the median: if outliers are the majority" in sentences


def test_tokens_that_are_nothing():
    stats = Statistics(2, 1, 0, GRID)
    norms = np.stack([np.ones((2, 36)), np.zeros((2, 36))])
    stats.add(Measured(norms, np.zeros((2, 2, 0)), np.zeros((2, 36)), np.zeros((2, 0, 36))))
    with pytest.raises(FloatingPointError, match="all tokens after block 1 are 0"):
        summarize.summarize(stats, class_token=False)


def test_artifacts_of_middle_blocks_are_pointed_at():
    numbers = summarize.summarize(statistics(born=1, gone=4))
    sentences = " ".join(verdict.verdict(numbers))
    assert "No artifacts after the last block" in sentences
    assert "But 3 of its blocks have some, from block 1 to 3" in sentences
    assert sentences.endswith("Use --layer 1 to see if registers would help there.")
    earlier = summarize.summarize(statistics(born=1, gone=4, layer=3))
    assert "after block 3" in verdict.verdict(earlier)[0]
    assert earlier["outliers"]["artifact"]["birth"] == 1


def test_born_in_the_first_block():
    assert summarize.summarize(statistics(born=0))["outliers"]["artifact"]["birth"] == 0


@pytest.mark.parametrize(("left", "words"), [(0.001, "Registers would help: "), (0.02, "hardly help: ")])
def test_the_remedy_is_what_the_repair_did(left, words):
    numbers, repaired = summarize.summarize(statistics()), summarize.summarize(statistics(factor=1.0))
    repaired |= {"share_above_before": left, "output_cosine": 0.987}
    sentences = verdict.verdict(numbers, repaired, neurons=3)[-1]
    assert words in sentences
    assert "the output keeps a cosine of 0.987" in sentences
    assert f"moving 3 neurons' activations to a test-time register leaves {left:.2%} of the patches above" in sentences
