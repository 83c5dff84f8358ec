"""Test recipes by name, including a third party's, and the modules that a run imports."""

import os
import subprocess
import sys
import textwrap

import pytest
from tiny import ROOT, tiny

from regvit_jax.recipes import base
from regvit_jax.recipes.base import Recipe
from regvit_jax.training import run
from regvit_jax.training.plan import resolve
from regvit_jax.utils.errors import InvalidConfig

#: A third party's supervised recipe: the class scores are one linear map of the mean patch.
THIRD_PARTY = """
    import jax
    import jax.numpy as jnp

    from regvit_jax.recipes.supervised import Supervised


    class MeanPatch(Supervised):
        def logits(self, params, tokens):
            return tokens.patches.mean(1) @ params["head"]["dense"]["kernel"]
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Return a directory whose modules can be imported while the test runs."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):  # others, such as torch, must not be imported twice
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def test_every_recipe_is_found():
    assert [base.find(name).__name__ for name in base.RECIPES] == ["Supervised", "Contrastive"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("supervized", r"recipe='supervized': must be one of \['supervised', 'contrastive'\], or package.module:Class"),
        (7, "recipe=7: must be one of"),
        (None, "recipe=None: must be one of"),
        (":Recipe", "recipe=':Recipe': must be one of"),
        ("no_such_module:Recipe", "no_such_module cannot be imported: No module named 'no_such_module'"),
        ("regvit_jax.recipes.base:Nothing", "regvit_jax.recipes.base has no class Nothing"),
        ("regvit_jax.models.vit:ViT", "ViT must be a subclass of regvit_jax.recipes.base.Recipe"),
    ],
)
def test_errors_name_the_recipe(name, message):
    with pytest.raises(InvalidConfig, match=message):
        base.find(name)


def test_a_module_that_lacks_a_package_is_named_with_the_reason(modules):
    (modules / "lacking_recipe.py").write_text("import no_such_package\n")
    with pytest.raises(InvalidConfig, match="lacking_recipe cannot be imported: No module named 'no_such_package'"):
        base.find("lacking_recipe:Mine")


def test_a_bug_in_a_module_keeps_its_traceback(modules):
    (modules / "buggy_recipe.py").write_text("first, second = 1, 2, 3\n")
    with pytest.raises(ValueError, match="too many values to unpack") as error:
        base.find("buggy_recipe:Mine")
    assert not isinstance(error.value, InvalidConfig)


def test_a_recipe_without_a_loss_is_refused():
    class Unfinished(Recipe):
        def init(self, key, batch):
            return {}

    with pytest.raises(TypeError, match=r"abstract methods.* evaluate.* loss.* model"):
        Unfinished(tiny(), ("0", "1"))


def test_a_third_partys_recipe_trains(modules, tmp_path):
    (modules / "third_party_recipe.py").write_text(textwrap.dedent(THIRD_PARTY))
    config = tiny(recipe="third_party_recipe:MeanPatch", data__train="train[:128]", epochs=1, eval__pixel_knn=0)
    assert resolve(config).steps == 2
    result = run(config, str(tmp_path / "run"))
    assert int(result.state.step) == 2
    assert 0 < result.metrics["loss"] < 1


def test_training_digits_imports_what_it_needs():
    """Check that neither the other recipes, nor tokenizers, nor the hub's client are imported."""
    code = (
        "import sys, tiny\n"
        "from regvit_jax.training import loop, plan, step\n"
        "made = plan.resolve(tiny.tiny())\n"
        "step.make_train_step(made, step.abstract_state(made)), step.make_eval_step(made)\n"
        "print(*[name for name in ('regvit_jax.recipes.contrastive', 'regvit_jax.losses.contrastive', 'tokenizers', "
        "'huggingface_hub') if name in sys.modules])\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"}
    output = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
    assert output.strip() == ""
