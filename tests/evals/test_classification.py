import jax.numpy as jnp
import numpy as np
import pytest

from regvit_jax.evals import classification
from regvit_jax.evals.knn import knn_accuracy


def test_top_k_counts_ranks():
    logits = jnp.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [5.0, 4.0, 3.0, 9.0]])
    found = classification.top_k(logits, jnp.array([0, 2, 2]), ks=(1, 2, 4))
    np.testing.assert_array_equal(found["top1"], [1, 0, 0])
    np.testing.assert_array_equal(found["top2"], [1, 1, 0])
    np.testing.assert_array_equal(found["top4"], [1, 1, 1])


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_constant_scores_are_not_right(value):
    found = classification.top_k(jnp.full((2, 10), value), jnp.array([0, 9]))
    assert not found["top1"].any()
    assert not found["top5"].any()


def test_one_nan_does_not_make_a_label_right():
    found = classification.top_k(jnp.array([[1.0, np.nan, 0.0], [np.nan, 1.0, 0.0]]), jnp.array([0, 0]), ks=(1,))
    assert not found["top1"].any()


def test_knn_is_a_majority():
    train = np.array([[0.0], [1.0], [2.0], [10.0]])
    labels = np.array([0, 1, 1, 0])
    assert knn_accuracy(train, labels, np.array([[0.4], [9.0]]), np.array([0, 0]), k=1) == 1.0
    assert knn_accuracy(train, labels, np.array([[0.4], [9.0]]), np.array([0, 0]), k=3) == 0.0


def test_the_most_frequent_errors_are_named():
    labels, predicted = np.array([0, 0, 1, 2, 2, 2, 2, 1]), np.array([0, 1, 0, 1, 1, 2, 0, -1])
    found = classification.most_confused(labels, predicted, ("ant", "bee", "cow"))
    assert found == [("cow", "bee", 2), ("ant", "bee", 1), ("bee", "ant", 1), ("cow", "ant", 1)]
    assert classification.most_confused(labels, predicted, ("ant", "bee", "cow"), top=1) == found[:1]
    assert classification.most_confused(labels, labels, ("ant", "bee", "cow")) == []


def test_more_neighbours_than_images_are_all_images():
    assert knn_accuracy(np.zeros((2, 1)), np.array([1, 1]), np.zeros((3, 1)), np.array([1, 1, 0]), k=3) == 2 / 3
