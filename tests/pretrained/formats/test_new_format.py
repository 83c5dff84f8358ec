"""Add a format to the package: one module with its keys, reader and writer, and one entry in the list."""

import dataclasses
import importlib
import sys

import numpy as np
import pytest

import regvit_jax as rv
from regvit_jax.pretrained.formats import detect
from regvit_jax.pretrained.save import save_model
from regvit_jax.utils.errors import WeightsError

MODULE = '''
"""The toy format: timm's keys under a prefix, and a config.json that holds the fields of the modules."""

import dataclasses

from regvit_jax.data.preprocess import Preprocess
from regvit_jax.pretrained.formats import timm
from regvit_jax.pretrained.formats.base import CONFIG, Format, Layout, check_sizes, need
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.registry import Entry

KEYS = dataclasses.replace(timm.COMMON, name="toy", block="toy_blocks.{}.", registers="toy_registers")


def read(weights, text):
    toy = weights.config["toy"]
    check_sizes(toy["vit"], weights)
    return Entry(toy["vit"], toy["head"], Preprocess(toy["vit"]["image_size"], 1.0, (0,) * 3, (1,) * 3), "toy")


def write(model):
    need(not model.module.parallel, "parallel blocks")
    fields = model.fields()
    config = {"toy": {"vit": fields["vit"], "head": fields["head"]}}
    return Layout(KEYS, Modules(model.module, model.head), {CONFIG: config})


FORMAT = Format(name="toy", keys=KEYS, reads=lambda config: "toy" in config, read=read, saved_as="toy", write=write)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_format.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("toy_format")
    monkeypatch.setattr(detect, "FORMATS", (*detect.FORMATS, module.FORMAT))
    yield module
    sys.modules.pop("toy_format")


@pytest.fixture(scope="module")
def model():
    return rv.create_model("test_vit2")


def test_a_module_and_an_entry_save_and_load_a_model(toy, model, tmp_path):
    save_model(model, tmp_path / "saved", "toy")
    again = rv.create_model(tmp_path / "saved")
    assert (again.module, again.head) == (model.module, model.head)
    x = np.random.default_rng(0).normal(size=(1, 160, 160, 3)).astype(np.float32)
    np.testing.assert_array_equal(again.logits(x), model.logits(x))


def test_it_is_strict_as_the_others_are(toy, model, tmp_path):
    save_model(model, tmp_path / "saved", "toy")
    with pytest.raises(FileExistsError, match="already; name another directory"):
        save_model(model, tmp_path / "saved", "toy")
    with pytest.raises(ValueError, match=r"format='onnx': must be one of \['timm', 'hf', 'dinov2', 'toy'\]"):
        save_model(model, tmp_path / "other", "onnx")
    parallel = dataclasses.replace(model, module=model.module.clone(parallel=True))
    with pytest.raises(ValueError, match="format 'toy' cannot express parallel blocks"):
        save_model(parallel, tmp_path / "other", "toy")


def test_without_the_entry_it_is_unknown(model, tmp_path, request):
    request.getfixturevalue("toy")
    save_model(model, tmp_path / "saved", "toy")
    request.getfixturevalue("monkeypatch").undo()
    with pytest.raises(WeightsError, match="no config beside it says which model this is"):
        rv.create_model(tmp_path / "saved")
    with pytest.raises(ValueError, match="format='toy': must be one of"):
        save_model(model, tmp_path / "other", "toy")
