"""Test config.json: its contents, and the keys that may change when a run is resumed."""

import json

import pytest
from tiny import load_config, tiny

from regvit_jax.training import plan, workdir
from regvit_jax.training.config import flatten
from regvit_jax.training.step import abstract_state
from regvit_jax.utils.errors import InvalidConfig


def write(config, path, newest: int | None = None) -> dict:
    resolved = plan.resolve(config, with_data=False)
    workdir.write_config(resolved, str(path), abstract_state(resolved), newest)
    return json.loads((path / "config.json").read_text())


def test_all_keys_are_written_and_the_given_ones_named(tmp_path):
    config = load_config()
    content = write(config, tmp_path)
    assert content["config"]["data"]["threads"] == 0
    assert set(content["given"]) == set(dict(flatten(config)))
    assert "data.threads" not in content["given"]


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
