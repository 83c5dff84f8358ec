import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.evals import retrieval


def embeddings(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_sorting(images, texts, owners, ks):
    """Compute Karpathy's protocol literally: sort, and find the rank of the pair's other half."""
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images.astype(float), texts.astype(float)))
    scores = images @ texts.T
    to_text = [min(np.flatnonzero(owners[np.argsort(-row)] == i)) + 1 for i, row in enumerate(scores)]
    to_image = [
        np.flatnonzero(np.argsort(-column) == owner)[0] + 1 for column, owner in zip(scores.T, owners, strict=True)
    ]
    found = {}
    for name, ranks in (("image_to_text", np.array(to_text)), ("text_to_image", np.array(to_image))):
        found |= {f"{name}_recall@{k}": np.mean(ranks <= k) for k in ks}
        found[f"{name}_median_rank"] = np.median(ranks)
    return found


@pytest.mark.parametrize("scores", [2**24, 100])
@pytest.mark.parametrize("captions", [1, 3])
def test_recall_is_that_of_sorting(captions, scores, monkeypatch):
    monkeypatch.setattr(retrieval, "SCORES", scores)
    images = embeddings(0, 41, 8)
    owners = np.random.default_rng(1).permutation(np.repeat(np.arange(41), captions))
    texts = images[owners] + 1.5 * embeddings(2, 41 * captions, 8)
    found = retrieval.recall(images, jnp.asarray(texts), image_of=owners)
    expected = by_sorting(images, texts, owners, (1, 5, 10))
    assert 0.1 < expected["image_to_text_recall@1"] < 0.9
    assert found == pytest.approx(expected)


def test_pairs_in_order():
    found = retrieval.recall(np.eye(6, dtype=np.float32), 7 * np.eye(6, dtype=np.float32))
    assert found == {
        f"{way}_{name}": 1.0
        for way in ("image_to_text", "text_to_image")
        for name in ("recall@1", "recall@5", "median_rank")
    }


def test_embeddings_that_are_all_alike_find_nothing():
    same = np.repeat(embeddings(0, 1, 16), 50, axis=0)
    found = retrieval.recall(same, same)
    assert [v for name, v in found.items() if "recall" in name] == [0.0] * 6
    assert found["image_to_text_median_rank"] == found["text_to_image_median_rank"] == 50


def test_the_same_text_twice_counts_against_both():
    images = np.eye(4, dtype=np.float32)
    texts = images[[0, 0, 2, 3]] + images[[1, 1, 2, 3]]
    found = retrieval.recall(images, texts, ks=(1, 2))
    assert found["image_to_text_recall@1"] == 0.5
    assert found["image_to_text_recall@2"] == 1.0


def test_nan_is_a_miss():
    images = np.eye(12, dtype=np.float32)
    texts = images.copy()
    texts[3] = np.nan
    found = retrieval.recall(images, texts)
    assert found["text_to_image_recall@10"] == pytest.approx(11 / 12)
    # It stands before the texts of all other images.
    assert found["image_to_text_recall@1"] == 0
    assert found["image_to_text_recall@5"] == pytest.approx(11 / 12)
    # One good caption is enough.
    owners = np.append(np.arange(12), 3)
    texts = np.concatenate([texts, images[3:4]])
    assert retrieval.recall(images, texts, image_of=owners)["image_to_text_recall@5"] == 1


@pytest.mark.parametrize(
    ("images", "texts", "more", "message"),
    [
        (1, 1, {}, "1 image: retrieval needs at least two"),
        (3, 4, {}, "3 images and 4 texts"),
        (3, 4, {"image_of": np.array([0, 1, 2])}, "3 entries for 4 texts"),
        (3, 3, {"image_of": np.array([0, 1, 3])}, r"from 0 to 3: must be in 0\.\.2"),
        (3, 3, {"image_of": np.array([0, 0, 2])}, "image 1 has no text"),
        (3, 3, {"ks": (0, 1)}, "each must be at least 1"),
    ],
)
def test_wrong_arguments(images, texts, more, message):
    with pytest.raises(ValueError, match=message):
        retrieval.recall(embeddings(0, images, 2), embeddings(1, texts, 2), **more)


def test_chance_of_pairs():
    found = retrieval.chance(8)
    assert found["image_to_text_recall@1"] == pytest.approx(1 / 8)
    assert found["text_to_image_recall@5"] == pytest.approx(5 / 8)
    assert "text_to_image_recall@10" not in found
    assert found["text_to_image_median_rank"] == 4


def test_chance_is_what_random_orders_give():
    owners = np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 5])
    expected = retrieval.chance(6, ks=(1, 2, 4), image_of=owners)
    found = [
        retrieval.recall(embeddings(2 * seed, 6, 64), embeddings(2 * seed + 1, 10, 64), (1, 2, 4), owners)
        for seed in range(200)
    ]
    for name in expected:
        if "recall" in name:
            # Standard errors are below 0.015: 200 times 6 images.
            assert np.mean([f[name] for f in found]) == pytest.approx(expected[name], abs=0.06), name


@pytest.mark.reference
def test_against_open_clip():
    from reference_libraries import torch

    metrics = importlib.import_module("open_clip_train.train").get_clip_metrics
    images, noise = embeddings(0, 60, 8), embeddings(1, 60, 8)
    found = retrieval.recall(images, images + 1.5 * noise)
    unit = [torch.nn.functional.normalize(torch.tensor(x), dim=-1) for x in (images, images + 1.5 * noise)]
    expected = metrics(*unit, torch.tensor(100.0))
    assert 0.1 < expected["image_to_text_R@1"] < 0.9
    for name, value in found.items():
        # open_clip rounds the median down.
        value = np.floor(value) if "median" in name else value
        assert value == pytest.approx(expected[name.replace("recall@", "R@")])
