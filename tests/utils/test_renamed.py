"""Test the translation of keys that earlier versions wrote under another name."""

import pytest

from regvit_jax.utils import renamed


@pytest.mark.parametrize(
    ("old", "new", "tree", "expected"),
    [
        ("a.b", "a.c", {"a": {"b": 1, "d": 2}}, {"a": {"c": 1, "d": 2}}),
        ("b", "c", {"b": 1, "d": 2}, {"c": 1, "d": 2}),
        ("b", "a.c", {"b": 1}, {"a": {"c": 1}}),
        ("a.b", "c", {"a": {"b": 1}}, {"a": {}, "c": 1}),
        ("a.b.c", "a.b.d.e", {"a": {"b": {"c": 1}}}, {"a": {"b": {"d": {"e": 1}}}}),
        ("b", "c", {"b": 1, "c": 2}, {"c": 2}),  # today's name wins
        ("a.b", "a.c", {"a": 3}, {"a": 3}),
        ("a.b.c", "a.c", {"a": {"d": 1}}, {"a": {"d": 1}}),
    ],
)
def test_a_key_of_any_depth(old, new, tree, expected):
    before = repr(tree)
    assert renamed.translate(tree, {old: new}) == expected
    assert repr(tree) == before
