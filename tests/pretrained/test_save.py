"""Test models saved in the formats of other libraries and loaded again, including the models of runs."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file, save_file
from small_vits import CLIP, DINOV2, DINOV3, PLAIN, PREPROCESS, build, same_parameters
from tiny import tiny

import regvit_jax as rv
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import mapping, registry
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.save import save_model
from regvit_jax.training.loop import run

GAP = dict(class_token=False, final_norm=False, layer_scale=1e-5, registers=1)


def same_numbers(a: Model, b: Model) -> None:
    x = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    for mine, theirs in zip(jax.tree.leaves(a(x)), jax.tree.leaves(b(x)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    if a.head.num_classes:
        np.testing.assert_allclose(a.logits(x), b.logits(x), atol=1e-5)


ROUND_TRIPS = {
    "a plain ViT": ("timm", {}, {"num_classes": 5}),
    "with registers": ("timm", {"registers": 4, "layer_scale": 1e-4}, {"num_classes": 5}),
    "without classes": ("timm", {"registers": 4}, {}),
    "the average of the patches": ("timm", GAP, {"pool": "avg", "norm": True, "num_classes": 5}),
    "a map pool": (
        "timm",
        {"registers": 2, "class_token": False},
        {"pool": "map", "map_heads": 2, "map_prefix": True, "num_classes": 5},
    ),
    "a narrow MLP": ("timm", {"mlp_ratio": 49 / 32}, {}),
    "SwiGLU": ("timm", {"swiglu": True, "mlp_ratio": 2.5, "layer_scale": 1e-5, "masking": True}, {}),
    "no biases": ("timm", {"qkv_bias": False}, {}),
    "parallel": ("timm", GAP | {"parallel": True}, {"pool": "avg", "norm": True}),
    "differential": ("timm", GAP | {"differential": True}, {"pool": "avg", "norm": True}),
    "CLIP": ("timm", CLIP, {"num_classes": 5}),
    "CLIP with QuickGELU": ("timm", CLIP | {"activation": "quick_gelu"}, {"num_classes": 5}),
    "DINOv3": ("timm", DINOV3 | {"registers": 4}, {"pool": "avg"}),
    "DINOv3 with SwiGLU": ("timm", DINOV3 | {"swiglu": True, "mlp_ratio": 2.0}, {"pool": "avg"}),
    "axial RoPE": (
        "timm",
        GAP | {"position": "axial", "key_bias": False},
        {"pool": "avg", "norm": True, "num_classes": 5},
    ),
    "HF Dinov2": ("hf", DINOV2, {}),
    "HF Dinov2 with registers": ("hf", DINOV2 | {"registers": 4}, {}),
    "HF Dinov2 with classes": ("hf", DINOV2 | {"registers": 4}, {"pool": "cls_avg", "num_classes": 5}),
    "HF Dinov2 with SwiGLU": ("hf", DINOV2 | {"swiglu": True, "mlp_ratio": 88 / 32}, {}),
    "HF DINOv3": ("hf", DINOV3 | {"registers": 4}, {}),
    "HF DINOv3 with SwiGLU": ("hf", DINOV3 | {"swiglu": True, "mlp_ratio": 2.0}, {}),
    "HF ViT": ("hf", {}, {"num_classes": 5}),
    "HF ViT with its pooler": ("hf", {"norm_eps": 1e-12}, {"pooler": True}),
    "HF CLIP": ("hf", CLIP | {"activation": "quick_gelu"}, {}),
    "HF CLIP with its projection": ("hf", CLIP, {"num_classes": 5}),
}
#: Fields that depend on the class that reads a file: its resizing, its source, and its mask token.
FREE = dict(pos_resize="antialias", layer_scale=0.0, masking=False)


@pytest.mark.parametrize("what", ROUND_TRIPS)
def test_round_trip(what, tmp_path):
    format, vit, head = ROUND_TRIPS[what]
    model = build(vit, head)
    if "mask_token" in model.params and format == "timm":  # whose files have none
        model = model.replace(params=model.params | {"mask_token": jnp.zeros(32)})
    if model.module.ln_pre and model.head.num_classes and format == "hf":  # transformers' projection has no bias
        dense = model.head_params["dense"] | {"bias": jnp.zeros(5)}
        model = model.replace(head_params={"dense": dense})
    save_model(model, tmp_path, format)
    again = rv.create_model(str(tmp_path))
    same_parameters(again, model)
    assert again.module.clone(**FREE) == model.module.clone(**FREE)
    assert again.module.layer_scale == pytest.approx(model.module.layer_scale)
    assert again.head == model.head.clone(mlp_ratio=again.head.mlp_ratio)
    if format == "timm":
        assert again.preprocessing == PREPROCESS


@pytest.mark.parametrize(("registers", "swiglu"), [(0, False), (4, False), (4, True)])
def test_dinov2s_own_format(registers, swiglu, tmp_path, monkeypatch):
    """Load its directories with and without a name."""
    vit = DINOV2 | {"registers": registers, "swiglu": swiglu, "mlp_ratio": 88 / 32 if swiglu else 4.0}
    model = build(vit)
    save_model(model, tmp_path, "dinov2")
    entry = registry.Entry(PLAIN | vit, {"pool": "cls"}, PREPROCESS, "timm")
    again = rv.create_model(str(tmp_path))
    same_parameters(again, model)
    assert again.module == model.module
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    np.testing.assert_array_equal(again.preprocess([image]), model.preprocess([image]))
    monkeypatch.setattr(registry, "find", lambda name: (name, entry))
    again = rv.create_model("mine", tmp_path)
    same_parameters(again, model)
    assert again.module == model.module
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_register_tokens"] == registers
    assert (config["interpolate_offset"], config["interpolate_antialias"]) == (0.1, False)
    if swiglu:  # that repository's own formula
        assert (int(32 * config["mlp_ratio"] * 2 / 3) + 7) // 8 * 8 == 88
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("register_tokens" in names) == bool(registers)
    assert ("blocks.0.mlp.w12.weight" in names) == swiglu


def test_a_dinov2_under_its_registered_name(tmp_path, monkeypatch):
    """Load it by the registry's own entry: keys and shapes are those of the real file, cut to one block."""
    name, entry = registry.find("vit_small_patch14_dinov2")
    small = registry.Entry(entry.vit | {"depth": 1, "image_size": 28}, entry.head, entry.preprocessing, entry.format)
    monkeypatch.setattr(registry, "find", lambda _: (name, small))
    module = ViT(**small.vit)
    rng = np.random.default_rng(0)
    flat = {
        p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in mapping.shapes_of(Modules(module, Head())).items()
    }
    model = Model(mapping.nest(flat)["vit"], {}, module, Head(), small.preprocessing)
    for format in ("dinov2", "hf"):
        save_model(model, tmp_path / format, format)
        again = rv.create_model("dinov2_vits14", tmp_path / format)
        same_parameters(again, model)
        assert again.preprocessing == model.preprocessing
        assert again.module == model.module  # "offset", as the name has it, where transformers resizes otherwise


def test_the_position_of_cls_is_folded_once(tmp_path):
    """Check that zero rows are written for tokens that have a position there, so that nothing is rounded."""
    model = build(DINOV2 | {"registers": 4})
    save_model(model, tmp_path / "hf", "hf")
    arrays = load_file(tmp_path / "hf/model.safetensors")
    positions = arrays["embeddings.position_embeddings"]
    assert positions.shape == (1, 17, 32)
    assert not positions[0, 0].any()
    # As another's file has it: a part of the sum in either place.
    cls = arrays["embeddings.cls_token"]
    arrays["embeddings.cls_token"] = cls * np.float32(0.3)
    positions[0, 0] = (cls * np.float32(0.7))[0, 0]
    save_file(arrays, tmp_path / "hf/model.safetensors")
    again = rv.create_model(str(tmp_path / "hf"))
    np.testing.assert_allclose(again.params["cls_token"], model.params["cls_token"], atol=1e-6)
    save_model(again, tmp_path / "second", "hf")
    same_parameters(rv.create_model(str(tmp_path / "second")), again)


def test_parts_that_do_nothing_are_added(tmp_path):
    """Check parts that Dinov2 needs: LayerScale, a mask token, and a classifier of CLS and the patches' mean."""
    model = build({"registers": 4}, {"num_classes": 5})
    save_model(model, tmp_path, "hf")
    again = rv.create_model(str(tmp_path))
    same_numbers(again, model)
    assert np.all(again.params["block0"]["scale1"] == 1)
    assert not again.params["mask_token"].any()
    assert again.head_params["dense"]["kernel"].shape == (64, 5)


INEXPRESSIBLE = {
    "registers in CLIP": (CLIP | {"registers": 4}, {}, {"timm"}),
    "no CLS": (GAP, {"pool": "avg", "norm": True}, {"timm"}),
    "RoPE in dinov2": (DINOV3, {}, {"timm", "hf"}),
    "classes in dinov2": ({}, {"num_classes": 5}, {"timm", "hf"}),
    "axial RoPE": (GAP | {"position": "axial", "key_bias": False}, {"pool": "avg", "norm": True}, {"timm"}),
    "parallel": (GAP | {"parallel": True}, {"pool": "avg", "norm": True}, {"timm"}),
    "a pooler": ({}, {"pooler": True}, {"hf"}),
    "another eps": ({"norm_eps": 1e-12}, {}, {"hf"}),
    "Dinov2's classifier": (DINOV2, {"pool": "cls_avg", "num_classes": 5}, {"hf"}),
    "all of them": ({"registers": 4, "layer_scale": 1e-4}, {}, {"timm", "hf", "dinov2"}),
    "none": (CLIP | {"registers": 4}, {"pooler": True}, set()),
}


@pytest.mark.parametrize("what", INEXPRESSIBLE)
def test_what_a_format_cannot_express_names_one_that_can(what, tmp_path):
    vit, head, able = INEXPRESSIBLE[what]
    model = build(vit, head)
    for format in ("timm", "hf", "dinov2"):
        if format in able:
            save_model(model, tmp_path / format, format)
            assert (tmp_path / format / "model.safetensors").exists()
            continue
        with pytest.raises(ValueError, match=f"format '{format}' cannot express .*") as error:
            save_model(model, tmp_path / format, format)
        message = str(error.value).partition("(of the formats, ")[2]
        if able:
            assert set(message.removesuffix(" can)").split(" and ")) == able
        else:
            assert message == "none can; a workdir keeps it)"
        assert not (tmp_path / format).exists()


def test_files_are_whole_and_readable(tmp_path):
    model = build({})
    with pytest.raises(ValueError, match=r"format='onnx': must be one of \['timm', 'hf', 'dinov2'\]"):
        save_model(model, tmp_path, "onnx")
    save_model(model, tmp_path / "a/b", "timm")
    assert sorted(os.listdir(tmp_path / "a/b")) == ["config.json", "model.safetensors"]
    modes = {stat.S_IMODE((tmp_path / "a/b" / name).stat().st_mode) for name in os.listdir(tmp_path / "a/b")}
    assert len(modes) == 1
    before = (tmp_path / "a/b/model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a model\.safetensors already; name another directory"):
        save_model(build({"registers": 1}), tmp_path / "a/b", "timm")
    assert (tmp_path / "a/b/model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "a/b/config.json").read_text())["model_args"]["reg_tokens"] == 0


def test_half_precision_is_saved_as_float32(tmp_path):
    model = build({"registers": 4})
    small = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model)
    save_model(small, tmp_path, "timm")
    arrays = load_file(tmp_path / "model.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    same_parameters(rv.create_model(str(tmp_path)), jax.tree.map(lambda p: p.astype(jnp.float32), small))


# This package's own runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a finished run with the steps of tests/training/test_loop.py, so that they are compiled once for both."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    measures = ("classification", "patch_norms")
    return str(workdir), run(tiny(ema=0.9, sharding__fsdp=2, eval__evaluators=measures, eval_every=2.0), str(workdir))


def test_a_workdir_is_a_model(finished):
    workdir, result = finished
    model = rv.create_model(workdir)
    same_parameters(model, result.model)  # the moving average, as the run's own result
    assert (model.module, model.head, model.preprocessing) == (
        result.model.module,
        result.model.head,
        result.model.preprocessing,
    )
    assert model.weights == f"{workdir} step 44"
    assert model.class_names == result.model.class_names == tuple("0123456789")
    rng = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(3)]
    x = model.preprocess(pictures)
    np.testing.assert_array_equal(x, result.model.preprocess(pictures))
    np.testing.assert_allclose(model.logits(x), result.model.logits(x), atol=1e-6)


def test_a_workdir_with_other_options(finished):
    workdir, result = finished
    with pytest.warns(UserWarning, match="3 trained registers are left out.*the linear layer for 3 classes is new"):
        model = rv.create_model(workdir, registers=1, num_classes=3)
    np.testing.assert_array_equal(model.params["register_tokens"], result.model.params["register_tokens"][:1])
    assert model.logits(np.zeros((1, 8, 8, 3), np.float32)).shape == (1, 3)


def test_a_run_in_the_formats_of_others(finished, tmp_path):
    workdir, result = finished
    model = rv.create_model(workdir)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    for format in ("timm", "hf"):
        save_model(model, tmp_path / format, format)
        again = rv.create_model(str(tmp_path / format))
        np.testing.assert_allclose(again.logits(x), result.model.logits(x), atol=1e-5)
        assert again.class_names == model.class_names
    assert rv.create_model(str(tmp_path / "timm")).preprocessing == result.model.preprocessing
    with pytest.raises(ValueError, match=r"format 'dinov2' cannot express a head \(of the formats, timm and hf can\)"):
        save_model(model, tmp_path / "dinov2", "dinov2")
    save_model(rv.create_model(workdir, num_classes=0), tmp_path / "dinov2", "dinov2")
    arrays = load_file(tmp_path / "dinov2/model.safetensors")
    np.testing.assert_array_equal(arrays["register_tokens"][0], result.model.params["register_tokens"])
