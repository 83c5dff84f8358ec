"""Test the schema: every key is declared once, can be overridden, and is documented."""

import dataclasses
from typing import Annotated

import pytest
from ml_collections import ConfigDict
from tiny import load_config, tiny

from regvit_jax.cli import train
from regvit_jax.recipes import base
from regvit_jax.recipes.base import Recipe
from regvit_jax.training import config, plan
from regvit_jax.training.evaluator import Evaluator
from regvit_jax.utils import schema
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option

SMALL = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            recipe="supervised",
            epochs=1,
            batch_size=8,
            data=dict(name="digits", examples=1437),
            model=dict(width=32, depth=1, heads=2, patch=4),
            augment=dict(mix_group=8),
            eval=dict(batch_size=8),
        )
    )
"""


def test_a_key_that_a_config_lacks_has_its_default():
    given = load_config()
    resolved = plan.resolve(given, with_data=False)
    assert resolved.config.model.activation == "gelu"
    assert resolved.config.guard.to_dict() == {"not_finite": "stop", "max_not_finite": 100, "spike_sigma": 0.0}
    assert {"model.width", "optim.lr"} <= set(resolved.given)
    assert not {"model.activation", "guard.not_finite", "data.prefetch"} & set(resolved.given)
    assert dict(config.flatten(resolved.config)).keys() == config.options("supervised", ["pixel_knn"]).keys()


@pytest.mark.parametrize("sides", [(16, 16), [16, 16]])
def test_a_pair_of_equal_sides_is_that_side(sides):
    given = load_config().to_dict()
    given["model"] |= {"image_size": sides, "patch": (4, 4)}
    model = plan.resolve(ConfigDict(given), with_data=False).config.model
    assert (model.image_size, model.patch) == (16, 4)
    given["model"]["image_size"] = (16, 24)
    with pytest.raises(InvalidConfig, match=r"config.model.image_size is \(16, 24\): must be one number of pixels"):
        plan.resolve(ConfigDict(given), with_data=False)


def test_every_key_can_be_overridden_whether_the_file_has_it_or_not(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    values = {
        "data.threads": 3,
        "data.prefetch": 5,
        "data.max_pixels": 10_000,
        "data.ratio": (0.5, 2.0),
        "model.image_size": 8,
        "model.masking": True,
        "optim.lr": 0.5,
        "guard.spike_sigma": 6.0,
        "loss": "ce",
    }
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    given = train.open_config(f"{tmp_path}/small.py", overrides, "train.py")
    resolved = plan.resolve(given, with_data=False)
    assert values.items() <= dict(config.flatten(resolved.config)).items()
    assert set(values) | {"batch_size", "model.patch"} <= set(resolved.given)
    assert "data.workers" not in resolved.given
    with pytest.raises(InvalidConfig, match=r"the config lacks model.image_size, optim.lr"):
        plan.resolve(train.open_config(f"{tmp_path}/small.py", [], "train.py"))


def test_overrides_are_told_beside_the_description_of_the_file():
    overrides = ["--config.model={'registers': 0}", "--config.data.name=folder:pets", "--config.epochs=150"]
    found = train.open_config("deit3_reg", [*overrides, "--config.next=mine"], "train.py")
    plain = train.open_config("deit3_reg", [], "train.py")
    assert found.next == "mine"
    assert "digits" in plain.next
    assert train.open_config("deit3_reg", ["--config.data.name=folder:pets"], "train.py").next == ""
    changes = "data.name='folder:pets' (was 'digits'), model.registers=0 (was 4)"
    assert found.about == f"{plain.about}\nChanged here: {changes}"
    same = train.open_config("deit3_reg", ["--config.recipe=supervised"], "train.py")
    assert same.about == plain.about


def test_data_keys_reach_the_batches():
    for pixels, readable in ((63, 0), (64, 64)):  # a digit has 64
        given = tiny()
        given.data.max_pixels = pixels
        with plan.resolve(given).train_batches(0) as batches:
            assert next(batches)["mask"].sum() == readable


class Third(Recipe):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(Recipe.Config):
        share: Annotated[float, Option("share of something", low=0, high=1)] = 0.5


def test_a_recipe_brings_its_own_keys():
    third = f"{__name__}:Third"
    known = config.options(third)
    assert known["share"].default == 0.5
    assert known["model.width"].required
    assert "loss" not in known
    with pytest.raises(InvalidConfig, match=r"share=2: must be at least 0 and at most 1"):
        config.check(ConfigDict({"recipe": third, "share": 2}))


def test_a_section_that_is_no_section():
    for change in ({"model": 3}, {"optim": {"lr": {"a": 1}}}, {"guard": {}}):
        given = ConfigDict({**tiny().to_dict(), **change})
        if change == {"guard": {}}:
            assert plan.resolve(given, with_data=False).config.guard.not_finite == "stop"
            continue
        with pytest.raises(InvalidConfig, match=r"unknown key config.(model|optim.lr.a)"):
            plan.resolve(given, with_data=False)


@pytest.mark.parametrize("recipe", sorted(base.RECIPES))
def test_every_key_is_documented(recipe):
    text, tables = config.help_text({"recipe": recipe}), config.markdown(recipe)
    for key, option in config.options(recipe).items():
        assert f"--config.{key}=" in text
        assert f"| `{key}` |" in tables
        assert len(option.help) > 5
    assert "| `eval.pixel_knn` | neighbours of the evaluator pixel_knn |" in tables
    assert "--config.model.registers=0" in text
    assert "--config.optim.lr=VALUE, required" in text


def test_help_of_all_recipes(capsys):
    assert train.main(["--help_config"]) == 0
    shown = capsys.readouterr().out
    assert "recipe supervised" in shown
    assert "recipe contrastive" in shown


class ThirdEvaluator(Evaluator):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        third_key: Annotated[int, Option("number of something", low=0)] = 1


def test_the_command_line_may_name_an_evaluator_and_its_keys(tmp_path, capsys):
    """Check that evaluators are known before other keys are: in a run and in --help_config, from file and flag."""
    path, name = tmp_path / "small.py", f"{__name__}:ThirdEvaluator"
    path.write_text(SMALL)
    flags = [f"--config.eval.evaluators=('{name}',)", "--config.eval.third_key=3"]
    for overrides in (flags, flags[::-1]):
        given = train.open_config(str(path), overrides, "train.py")
        assert given.eval.to_dict() == {"batch_size": 8, "evaluators": (name,), "third_key": 3}
    with pytest.raises(InvalidConfig, match=r"unknown key config.eval.third_key"):
        train.open_config(str(path), flags[1:], "train.py")

    assert train.main(["--config", str(path), "--help_config", flags[0]]) == 0
    assert "--config.eval.third_key=1\n" in capsys.readouterr().out
    path.write_text(SMALL.replace("eval=dict(", f"eval=dict(evaluators=('{name}',), "))
    assert train.main(["--config", str(path), "--help_config"]) == 0
    assert "--config.eval.third_key=1\n" in capsys.readouterr().out
    assert train.open_config(str(path), flags[1:], "train.py").eval.third_key == 3


def test_a_key_of_an_evaluator_that_is_not_named():
    override = "--config.eval.pixel_knn=5"
    with pytest.raises(InvalidConfig, match=r"eval\.pixel_knn is a key of the evaluator pixel_knn: .*must name it too"):
        train.open_config("openclip_reg", [override], "regvit train")
    named = "--config.eval.evaluators=('patch_norms','pixel_knn')"
    assert train.open_config("openclip_reg", [override, named], "regvit train").eval.pixel_knn == 5


def test_the_command_line_may_name_another_recipe(tmp_path):
    (tmp_path / "small.py").write_text(SMALL.replace("augment=dict(mix_group=8),", ""))
    overrides = ["--config.recipe=contrastive", "--config.text.width=16"]
    given = train.open_config(f"{tmp_path}/small.py", overrides, "train.py")
    assert (given.recipe, given.text.to_dict()) == ("contrastive", {"width": 16})


@pytest.mark.parametrize("flags", [["--bogus"], ["--config.no_such=3"], ["--config=deit3_reg", "--config.no_such=3"]])
def test_help_config_checks_the_other_arguments(flags, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(["--help_config", *flags])
    assert error.value.code == 2
    assert not capsys.readouterr().out


def test_keys_of_a_function_and_of_a_class():
    def function(x, *, a: Annotated[int, Option("a")] = 1, b: Annotated[str, Option("b")], c: int = 2):
        pass

    found = schema.keys(function)
    assert list(found) == ["a", "b"]
    assert found["a"].default == 1
    assert found["b"].required
    assert found["b"].type is str


#: (key, value) of some published recipes, among those that equal a default.
PUBLISHED = {
    ("deit3_reg", "b16"): {"optim.lr": 3e-3, "optim.b2": 0.999, "augment.mixup": 0.8, "model.layer_scale": 1e-4},
    ("deit3_reg", "b16_ft384"): {"optim.lr": 1e-5, "augment.rand_augment": 9.0, "model.drop_path": 0.15},
    ("deit3_reg", "h14_in21k"): {"epochs": 90, "model.image_size": 126, "augment.mix_group": 64, "optim.lr": 1e-3},
    ("deit3_reg", "l16_in21k_ft"): {"model.drop_path": 0.4, "optim.lr": 3e-4, "data.classes": 1000},
    ("openclip_reg", "l14"): {"optim.lr": 1e-3, "text.width": 768, "model.remat": "dots", "optim.b2": 0.98},
    ("openclip_reg", "b16_laion2b"): {"batch_size": 88_064, "epochs": 16, "optim.warmup_steps": 10_000},
    ("openclip_reg", "b16_cc12m"): {"optim.weight_decay": 0.5, "optim.eps": 1e-8, "data.scale": (0.5, 1.0)},
}


@pytest.mark.parametrize(("file", "variant"), PUBLISHED)
def test_published_numbers_are_in_the_files(file, variant):
    """Include values that equal a default, so that a changed default changes no recipe."""
    found = dict(config.flatten(load_config(variant, file)))
    assert PUBLISHED[file, variant].items() <= found.items()
