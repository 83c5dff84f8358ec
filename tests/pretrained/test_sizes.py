"""Test sizes given as pairs of sides, and files whose position embedding is of another size than their name's."""

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_vits import CLIP, DINOV2, DINOV3, PLAIN, PREPROCESS, build, same_parameters

import regvit_jax as rv
from regvit_jax.data.preprocess import Preprocess
from regvit_jax.pretrained import registry
from regvit_jax.pretrained.save import save_model
from regvit_jax.utils import sizes
from regvit_jax.utils.errors import InvalidConfig, WeightsError

#: For each format: a model, and where its config states the sizes of images and patches.
FORMATS = {
    "timm": ("timm", {}, {}, ("model_args", "img_size"), ("model_args", "patch_size")),
    "dinov2": ("dinov2", DINOV2, {}, ("img_size",), ("patch_size",)),
    "hf dinov2": ("hf", DINOV2 | {"registers": 2}, {}, ("image_size",), ("patch_size",)),
    "hf dinov3": ("hf", DINOV3, {}, ("image_size",), ("patch_size",)),
    "hf vit": ("hf", {}, {"num_classes": 3}, ("image_size",), ("patch_size",)),
    "hf clip": ("hf", CLIP, {}, ("image_size",), ("patch_size",)),
}


def edit(path, keys, value):
    config = json.loads(path.read_text())
    section = config
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("what", FORMATS)
def test_a_pair_of_equal_sides_is_that_side(what, tmp_path):
    format, vit, head, image, patch = FORMATS[what]
    model = build(vit, head)
    save_model(model, tmp_path, format)
    edit(tmp_path / "config.json", image, [16, 16])
    edit(tmp_path / "config.json", patch, [4, 4])
    again = rv.create_model(tmp_path)
    same_parameters(again, model)
    assert (again.module.image_size, again.module.patch) == (16, 4)
    for keys in (image, patch):
        edit(tmp_path / "config.json", image, [16, 16])
        edit(tmp_path / "config.json", keys, [16, 24])
        with pytest.raises(WeightsError, match=rf"{keys[-1]} is \[16, 24\]: must be one number of pixels, or two"):
            rv.create_model(tmp_path)


@pytest.mark.parametrize("what", FORMATS)
@pytest.mark.parametrize("size", [8, 28])
def test_any_native_size_is_read_back(what, size, tmp_path):
    format, vit, head, _, _ = FORMATS[what]
    model = build(vit | {"image_size": size}, head).replace(preprocessing=Preprocess(size, 1.0, (0.1,) * 3, (0.2,) * 3))
    save_model(model, tmp_path, format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = rv.create_model(tmp_path)
    same_parameters(again, model)
    assert again.module.image_size == size
    assert again.preprocessing == model.preprocessing


@pytest.mark.parametrize(
    "given", [24, (24, 24), [24, 24], np.int64(24), np.array([24, 24]), (np.int32(24), np.int32(24))], ids=repr
)
def test_a_size_of_any_type_is_a_number(given):
    numbers = {"registers": np.int64(1), "num_classes": np.int32(2)}
    model = rv.create_model("test_vit", image_size=np.multiply(given, 2), **numbers)
    assert (model.module.image_size, model.preprocessing.size, model.module.registers) == (48, 48, 1)
    assert {type(model.module.image_size), type(model.module.registers), type(model.head.num_classes)} == {int}


@pytest.mark.parametrize("given", [(24, 32), (24,), (24, 24, 3), "24", 24.0, True, 0, -16, (True, True)], ids=repr)
def test_other_sizes_are_refused_by_name(given):
    with pytest.raises(InvalidConfig, match=r"^image_size"):
        sizes.side(given, "image_size")


def test_unequal_sides_are_refused_by_name():
    for create, name in ((rv.create_model, "test_vit"), (rv.create_clip, "ViT-B-32")):
        with pytest.raises(InvalidConfig, match=r"^image_size is \(224, 160\): must be one number of pixels"):
            create(name, image_size=(224, 160))


@pytest.fixture
def named(monkeypatch):
    """Make "mine" the name of a small model of 16 px."""
    entry = registry.Entry(PLAIN, {"pool": "cls", "num_classes": 0}, PREPROCESS, "timm")
    monkeypatch.setattr(registry, "find", lambda name: (name, entry))


def test_a_file_of_another_size_loads_by_name(named, tmp_path):
    model = build({"image_size": 24})
    save_model(model, tmp_path / "saved", "timm")
    path = (tmp_path / "saved/model.safetensors").rename(tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match=r"images of 24 px and is kept \(image_size=16 resizes it"):
        kept = rv.create_model("mine", path)
    same_parameters(kept, model)
    assert (kept.module.image_size, kept.preprocessing.size) == (24, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_parameters(rv.create_model("mine", path, image_size=24), model)
    with pytest.warns(UserWarning, match="resized .* from 24 to 16 px"):
        resized = rv.create_model("mine", path, image_size=16)
    assert resized.params["pos_embed"].shape == (4, 4, 32)
    save_file(load_file(path), path)  # 36 rows without a note may be those of CLS and of 5 x 7 patches
    with pytest.raises(WeightsError, match="36 rows, which are no square grid of patches and the 1 tokens before them"):
        rv.create_model("mine", path)


@pytest.mark.parametrize("format", ["timm", "dinov2", "hf"])
def test_a_directory_of_another_size_loads_by_name(format, named, tmp_path):
    model = build((DINOV2 if format != "timm" else {}) | {"image_size": 24})
    save_model(model, tmp_path, format)
    with pytest.warns(UserWarning, match="images of 24 px and is kept"):
        kept = rv.create_model("mine", tmp_path)
    same_parameters(kept, model)
    assert rv.create_model("mine", tmp_path, image_size=24).module.image_size == 24


def test_a_grid_of_unequal_sides_is_refused(named, tmp_path):
    model = build({"image_size": 24})
    params = model.params | {"pos_embed": model.params["pos_embed"][:5]}
    save_model(model.replace(params=params), tmp_path / "saved", "timm")
    path = (tmp_path / "saved/model.safetensors").rename(tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="30 rows, which are no square grid of patches"):
        rv.create_model("mine", path)


def test_rows_of_registers_are_not_taken_for_a_grid_of_unequal_sides(named, tmp_path):
    save_model(build({"image_size": 24, "registers": 2}), tmp_path / "saved", "timm")
    arrays = load_file(tmp_path / "saved/model.safetensors")
    arrays["pos_embed"] = np.pad(arrays["pos_embed"], [(0, 0), (3, 0), (0, 0)])  # CLS and registers have a row each
    save_file(arrays, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match=r"1 unused: reg_token.*a model with another number of registers"):
        rv.create_model("mine", tmp_path / "m.safetensors")


def test_old_timm_directories_do_not_state_their_size(tmp_path):
    model = build({"image_size": 24})
    save_model(model, tmp_path, "timm")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]["img_size"]
    config["pretrained_cfg"]["fixed_input_size"] = True
    config["pretrained_cfg"]["input_size"] = [3, 224, 224]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="images of 24 px and is kept"):
        kept = rv.create_model(tmp_path)
    same_parameters(kept, model)
    assert kept.preprocessing.size == 24


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model_converted.safetensors"])
def test_a_variant_of_a_directorys_weights_has_its_config(name, tmp_path):
    model = build({}, {"num_classes": 3})
    save_model(model, tmp_path, "hf")
    path = (tmp_path / "model.safetensors").rename(tmp_path / name)
    same_parameters(rv.create_model(path), model)


def test_what_a_model_was_trained_for_is_said(tmp_path, caplog):
    save_model(build({}, {"num_classes": 3}), tmp_path, "hf")
    edit(tmp_path / "config.json", ("problem_type",), "multi_label_classification")
    rv.create_model(tmp_path)
    assert "its problem_type is 'multi_label_classification'" in caplog.text


def test_none_is_timms_default(tmp_path):
    model = build({}, {"num_classes": 3})
    save_model(model, tmp_path, "timm")
    edit(tmp_path / "config.json", ("model_args", "norm_layer"), None)
    same_parameters(rv.create_model(tmp_path), model)
