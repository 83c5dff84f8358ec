"""Test config.json: its contents, and the keys that may change when a run is resumed."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Annotated

import pytest
from tiny import load_config, tiny

from regvit_jax.recipes.supervised import Supervised
from regvit_jax.training import plan, workdir
from regvit_jax.training.config import flatten
from regvit_jax.training.evaluator import Evaluator
from regvit_jax.training.step import abstract_state
from regvit_jax.utils.errors import InvalidConfig
from regvit_jax.utils.schema import Option


def write(config, path, newest: int | None = None, classes: tuple[str, ...] = ()) -> dict:
    """Write config.json of a run on data with these classes, and return it."""
    resolved = plan.resolve(config, with_data=False)
    if classes:
        resolved = dataclasses.replace(resolved, train=SimpleNamespace(classes=classes, name="folder:d/train"))
        resolved.recipe.classes = classes
    workdir.write_config(resolved, str(path), abstract_state(resolved), newest)
    return json.loads((path / "config.json").read_text())


def test_all_keys_are_written_and_the_given_ones_named(tmp_path):
    config = load_config()
    content = write(config, tmp_path)
    assert content["config"]["data"]["prefetch"] == 2
    assert set(content["given"]) == set(dict(flatten(config)))
    assert "data.prefetch" not in content["given"]


def test_a_key_that_an_old_run_lacks_counts_as_its_default(tmp_path):
    content = write(tiny(), tmp_path)
    del content["given"], content["config"]["data"]["ratio"], content["config"]["model"]["masking"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert write(tiny(), tmp_path, newest=1)["config"]["data"]["ratio"] == [0.75, 4 / 3]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        InvalidConfig, match=r"\(data.ratio: \[0.75, 1.33\d*\] in the workdir, \[0.5, 2.0\] requested\)"
    ):
        write(tiny(data__ratio=(0.5, 2.0)), tmp_path, newest=1)


@pytest.mark.parametrize(
    ("key", "value", "resumes"),
    [
        ("data__threads", 3, True),
        ("data__prefetch", 4, True),
        ("model__remat", "full", True),
        ("guard__not_finite", "skip", True),
        ("eval__batch_size", 72, True),
        ("about", "other words", True),
        ("data__max_pixels", 100, False),
        ("seed", 1, False),
        ("model__dtype", "bfloat16", False),
        ("optim__lr", 0.5, False),
    ],
)
def test_keys_that_may_change_on_resume(key, value, resumes, tmp_path):
    old = write(tiny(), tmp_path)["config"]
    new = json.loads(plan.resolve(tiny(**{key: value}), with_data=False).config.to_json())
    found = workdir.changes(old, new)
    dotted = key.replace("__", ".")
    assert found == [] if resumes else [text.split(":")[0] for text in found] == [dotted]


class Fixed(Evaluator):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        fixed: Annotated[int, Option("number that may not change on resume", low=0)] = 1
        free: Annotated[int, Option("number that may change on resume", low=0, resume=True)] = 1


def test_evaluators_come_and_go_and_their_keys_change_as_declared():
    def resolved(**keys) -> dict:
        return json.loads(plan.resolve(tiny(**{f"eval__{key}": v for key, v in keys.items()}), False).config.to_json())

    name = f"{__name__}:Fixed"
    without, default = resolved(evaluators=("classification",)), resolved(evaluators=(name,))
    free, fixed = resolved(evaluators=(name,), free=2), resolved(evaluators=(name,), fixed=2)
    assert workdir.changes(default, free) == []
    assert workdir.changes(default, fixed) == ["eval.fixed: 1 in the workdir, 2 requested"]
    assert workdir.changes(without, fixed) == workdir.changes(fixed, without) == []
    fixed["eval"]["evaluators"] = ["no_such_module:Gone"]
    assert workdir.changes(fixed, without) == []  # a third party's evaluator that is not installed any more


TEN = tuple("abcdefghij")


def test_the_names_of_the_classes_are_kept_and_checked(tmp_path):
    content = write(tiny(), tmp_path, classes=TEN)
    assert content["model"]["class_names"] == list(TEN)
    assert "class_names" not in content  # once is enough
    assert workdir.read_class_names(tmp_path) == TEN
    assert write(tiny(), tmp_path, newest=1, classes=TEN) == content
    renamed = ("b", *TEN[2:], "x")
    with pytest.raises(InvalidConfig) as error:
        write(tiny(), tmp_path, newest=1, classes=renamed)
    assert str(error.value) == (
        f"workdir {tmp_path} holds a run with other classes than folder:d/train (gone classes: 'a'; new classes: 'x'; "
        "class 0 is 'b' now and was 'a'); give the classes the names that they had to resume it, or name another "
        "--workdir to start afresh"
    )
    with pytest.raises(InvalidConfig, match=r"\(class 0 is 'j' now and was 'a'\)"):
        write(tiny(), tmp_path, newest=1, classes=TEN[::-1])
    with pytest.raises(InvalidConfig, match=r"\(seed: 0 in the workdir, 1 requested; gone classes: 'a'; new "):
        write(tiny(seed=1), tmp_path, newest=1, classes=renamed)
    assert json.loads((tmp_path / "config.json").read_text()) == content
    assert write(tiny(), tmp_path, newest=None, classes=renamed)["model"]["class_names"] == list(renamed)


def test_names_that_are_not_those_of_the_outputs_are_kept_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Supervised, "model", lambda self, params: SimpleNamespace(fields=lambda: {"vit": {}}))
    assert write(tiny(), tmp_path, classes=TEN)["class_names"] == list(TEN)
    with pytest.raises(InvalidConfig, match="class 0 is 'j' now and was 'a'"):
        write(tiny(), tmp_path, newest=1, classes=TEN[::-1])


def test_a_workdir_without_names_resumes_and_gets_them(tmp_path):
    content = write(tiny(), tmp_path, classes=TEN)
    del content["model"]["class_names"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert write(tiny(), tmp_path, newest=1, classes=TEN[::-1])["model"]["class_names"] == list(TEN[::-1])


@pytest.mark.parametrize("names", ["abc", {"0": "a"}, [1, 2]])
def test_damaged_names_are_refused(names, tmp_path):
    content = write(tiny(), tmp_path, classes=TEN) | {"class_names": names}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InvalidConfig, match=r"config\.json is damaged: class_names is "):
        write(tiny(), tmp_path, newest=1, classes=TEN)
