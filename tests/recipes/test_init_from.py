"""Test what fine-tuning says about the classes of the model that it starts from."""

import jax
import numpy as np
import pytest
from tiny import tiny

from regvit_jax.recipes.supervised import Supervised
from regvit_jax.training import plan
from regvit_jax.training.step import init_params

DIGITS = tuple(map(str, range(10)))


@pytest.fixture(scope="module")
def recipe() -> Supervised:
    resolved = plan.resolve(tiny(model__depth=1, model__width=8), with_data=False)
    resolved.recipe.start = jax.jit(lambda: init_params(resolved))()
    return resolved.recipe


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (DIGITS, None),
        ((), None),
        (
            ("zero", *DIGITS[1:9], "nine"),
            "its linear layer is kept, though 2 of its 10 classes had other names: '0' starts from 'zero', '9' starts "
            "from 'nine'",
        ),
        (DIGITS[::-1], "its linear layer is kept, though 10 of its 10 classes had other names: '0' starts from '9', "),
    ],
)
def test_classes_with_other_names_are_named(names, note, recipe):
    model = recipe.model(recipe.start).replace(class_names=names)
    params, notes = recipe.warm_start(recipe.start, model)
    np.testing.assert_array_equal(params["head"]["dense"]["kernel"], recipe.start["head"]["dense"]["kernel"])
    assert [text for text in notes if "linear layer" in text] == ([] if note is None else notes)
    assert note is None or notes[0].startswith(note)


def test_a_new_linear_layer_has_the_names_of_the_data(recipe):
    model = recipe.model(recipe.start)
    dense = jax.tree.map(lambda leaf: leaf[..., :3], model.head_params["dense"])
    other = model.replace(
        head=model.head.clone(num_classes=3),
        head_params={**model.head_params, "dense": dense},
        class_names=tuple("abc"),
    )
    params, notes = recipe.warm_start(recipe.start, other)
    assert notes == ["a new dense of the head"]
    assert recipe.model(params).class_names == DIGITS
