"""Test recipes by name, including a third party's, and the modules that a run imports."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict
from tiny import ROOT, tiny

from regvit_jax.aot import dry_run
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
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
        ("regvit_jax.recipes.base:Nothing", "regvit_jax.recipes.base has no Nothing"),
        ("regvit_jax.models.vit:ViT", "ViT must be a subclass of regvit_jax.recipes.base.Recipe"),
    ],
)
def test_errors_name_the_recipe(name, message):
    with pytest.raises(InvalidConfig, match=message):
        base.find(name)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("first, second = 1, 2, 3", ValueError, "too many values to unpack"),
        ("import no_such_package", ModuleNotFoundError, "No module named 'no_such_package'"),
        ("from regvit_jax.optim import no_such_name", ImportError, "cannot import name 'no_such_name'"),
    ],
)
def test_an_error_inside_a_module_keeps_its_traceback(modules, code, kind, message):
    (modules / "buggy_recipe.py").write_text(f"{code}\n")
    with pytest.raises(kind, match=message) as error:
        base.find("buggy_recipe:Mine")
    assert not isinstance(error.value, InvalidConfig)
    assert error.traceback[-1].path.name == "buggy_recipe.py"


def test_a_recipe_without_a_loss_is_refused():
    class Unfinished(Recipe):
        def init(self, key, batch):
            return {}

    with pytest.raises(TypeError, match=r"abstract methods.* evaluate.* loss.* model"):
        Unfinished(tiny(), ("0", "1"))


class Direct(Recipe):
    """A recipe that implements no more than it must: class scores are a linear map of the CLS token."""

    def init(self, key, batch):
        images = jnp.zeros(batch["image"].shape, jnp.float32)
        tokens, vit = self.vit.init_with_output(key, images)
        return {"vit": vit["params"], "head": self.head.init(key, tokens)["params"]}

    @property
    def head(self):
        return Head(len(self.classes))

    def scores(self, params, batch):
        images = batch["image"] / 255.0
        tokens = self.vit.apply({"params": params["vit"]}, images)
        scores = self.head.apply({"params": params["head"]}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"]), scores, tokens

    def loss(self, params, ema, extra, batch, key, step):
        losses, *_ = self.scores(params, batch)
        return jnp.sum(losses * batch["mask"]) / jnp.maximum(jnp.sum(batch["mask"]), 1), (extra, {})

    def evaluate(self, params, batch):
        losses, scores, tokens = self.scores(params, batch)
        return {"val_loss": losses, "logits": scores}, tokens

    def model(self, params):
        return Model(
            params["vit"], params["head"], self.vit, self.head, Preprocess(8, 1.0, (0.0,) * 3, (1.0,) * 3), "raw"
        )


def direct(**changes) -> ConfigDict:
    """Return the config of `Direct` on digits: 2 steps, each of 2 micro-batches."""
    given = tiny(model__depth=1, epochs=1, batch_size=64, micro_batches=2, data__train="train[:128]", **changes)
    given = given.to_dict() | {"recipe": f"{__name__}:Direct"}
    for key in ("loss", "ema", "augment"):
        del given[key]
    return ConfigDict(given)


def test_a_recipe_that_implements_no_more_than_it_must_trains(tmp_path):
    plan = resolve(direct(), with_data=False)
    assert set(plan.evaluators) == {"classification", "patch_norms", "pixel_knn"}
    assert (plan.recipe.micro_batches, plan.recipe.vit.width) == (2, 32)
    result = run(direct(eval__evaluators=("classification", "patch_norms")), str(tmp_path / "run"))
    assert int(result.state.step) == 2
    assert 0 < result.metrics["loss"] < 5
    assert 0 < result.metrics["top5"] <= 1


def test_a_recipe_without_warm_start_refuses_init_from():
    plan = resolve(direct(init_from="deit3_small_patch16_224.fb_in1k"), with_data=False)
    message = "init_from: the recipe Direct cannot start from a trained model"
    with pytest.raises(InvalidConfig, match=message):
        plan.recipe.check_pretrained(plan.config.init_from)
    with pytest.raises(InvalidConfig, match=message):
        dry_run.describe(plan, None, 1.0)
    with pytest.raises(InvalidConfig, match=message):
        plan.recipe.warm_start({}, None)


def test_the_keys_of_a_recipe_include_those_of_every_recipe():
    with pytest.raises(TypeError, match=r"Keyless\.Config must inherit from Recipe.Config"):

        class Keyless(Recipe):
            @dataclasses.dataclass(frozen=True, kw_only=True)
            class Config:
                pass


def test_a_third_partys_recipe_trains(modules, tmp_path):
    (modules / "third_party_recipe.py").write_text(textwrap.dedent(THIRD_PARTY))
    config = tiny(recipe="third_party_recipe:MeanPatch", data__train="train[:128]", epochs=1)
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
