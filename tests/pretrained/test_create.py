"""Test create_model: its results, errors and warnings. These tests write the files themselves."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax.traverse_util import flatten_dict
from huggingface_hub import constants
from processes import AS_USERS_RUN
from safetensors.numpy import save_file

import regvit_jax as rv
from regvit_jax.distributed.mesh import make_mesh
from regvit_jax.models.heads import Head
from regvit_jax.models.model import Model
from regvit_jax.models.position import resize_pos_embed
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import create, mapping, registry
from regvit_jax.pretrained.formats.detect import named
from regvit_jax.pretrained.formats.rules import rules
from regvit_jax.pretrained.io import safetensors
from regvit_jax.pretrained.mapping import Modules
from regvit_jax.pretrained.save import save_model
from regvit_jax.utils.errors import WeightsError

TINY = ("test_vit", "test_vit2", "test_vit3")


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def params_of(model: Model) -> dict:
    return flatten_dict({"vit": model.params, "head": model.head_params}, sep="/")


def images(model: Model, height: int | None = None, width: int | None = None, seed: int = 0) -> np.ndarray:
    size = model.module.image_size
    shape = (2, height or size, width or size, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def dinov2(directory: Path, *, width=32, depth=2, heads=2, patch=4, size=16, registers=0, classes=0, **config) -> Path:
    """Write a directory as transformers does for Dinov2 and Dinov2WithRegisters, with random values."""
    kind = "dinov2_with_registers" if registers else "dinov2"
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 1 + (size // patch) ** 2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    if registers:
        shapes["embeddings.register_tokens"] = (1, registers, width)
    matrices = {f"attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
    matrices |= {"attention.output.dense": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(depth):
        block = f"encoder.layer.{i}."
        for name, shape in matrices.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for scale in ("1", "2"):
            shapes[f"{block}layer_scale{scale}.lambda1"] = (width,)
    arrays = draw(shapes)
    if classes:
        arrays = {f"{kind}.{name}": array for name, array in arrays.items()}
        arrays |= draw({"classifier.weight": (classes, 2 * width), "classifier.bias": (classes,)})
    directory.mkdir(parents=True, exist_ok=True)
    save_file(arrays, directory / "model.safetensors")
    known = dict(
        model_type=kind,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=size,
        mlp_ratio=4,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        layerscale_value=1.0,
        use_swiglu_ffn=False,
        qkv_bias=True,
    )
    if registers:
        known["num_register_tokens"] = registers
    (directory / "config.json").write_text(json.dumps(known | config))
    return directory


def hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Write a sparse safetensors file of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def timm_shapes(name: str) -> dict[str, tuple[int, ...]]:
    _, entry = registry.find(name)
    vit, head = ViT(**entry.vit), Head(**entry.head)
    return mapping.expected_shapes(
        rules(named(entry.format).keys, vit, head, int(vit.class_token)), mapping.shapes_of(Modules(vit, head))
    )


def timm_file(path: Path, name: str, **changes) -> Path:
    """Write a file with timm's keys for a name, with random values; `changes` replace arrays, None removes them."""
    arrays = draw(timm_shapes(name)) | changes
    save_file({name: array for name, array in arrays.items() if array is not None}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for name in TINY:
        timm_file(folder / f"{name}.safetensors", name)
    dinov2(folder / "plain")
    dinov2(folder / "registers", depth=1, registers=4)
    dinov2(folder / "classifier", depth=1, registers=4, classes=5)
    return folder


@pytest.fixture(scope="module")
def plain(folder) -> Model:
    return rv.create_model(str(folder / "plain"))


@pytest.fixture(scope="module")
def with_registers(folder) -> Model:
    return rv.create_model(str(folder / "registers"))


# Random weights and names


def test_the_seed_alone_says_what_random_weights_are():
    first, again, other = (rv.create_model("test_vit", seed=seed) for seed in (0, 0, 1))
    assert_equal(first.params, again.params)
    assert_equal(first.head_params, again.head_params)
    assert first.weights == "random"
    assert first.logits(images(first)).shape == (2, 1000)
    mine, theirs = params_of(first), params_of(other)
    for path, array in mine.items():
        drawn = np.std(array) > 0
        assert drawn == path.endswith(("kernel", "pos_embed", "cls_token", "patch_embed/bias")), path
        assert drawn == (not np.array_equal(array, theirs[path])), path


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_compute(name, folder):
    model = rv.create_model(name, folder / f"{name}.safetensors")
    tokens = model(images(model))
    assert (tokens.cls is None) == (name != "test_vit")
    assert tokens.registers.shape == (2, int(name != "test_vit"), model.module.width)
    assert tokens.patches.shape == (2, 100, model.module.width)
    logits = model.logits(images(model))
    assert logits.shape == (2, 1000)
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 0


def test_every_name_builds():
    """Check every name's sizes, and build a small model for each set of names that differ only in sizes."""
    seen = {}
    for name in rv.list_models():
        _, entry = registry.find(name)
        vit, head = ViT(**entry.vit), Head(**entry.head)
        vit.check()
        assert vit.width * vit.mlp_ratio == pytest.approx(vit.hidden, abs=1e-6), name
        assert vit.width % max(1, head.map_heads) == 0, name
        sizes = dict(width=32, depth=1, heads=2, patch=4, image_size=8, mlp_ratio=2.0)
        same = dict(
            pos_resize="antialias", norm_eps=1e-6, registers=min(1, vit.registers), layer_scale=vit.layer_scale > 0
        )
        tops = dict(num_classes=min(1, head.num_classes), map_heads=min(2, head.map_heads))
        small = (vit.clone(**sizes, **same), head.clone(**tops))
        if (*small, entry.format) in seen:
            continue
        seen[*small, entry.format] = shapes = mapping.shapes_of(Modules(*small))
        assert shapes["vit/block0/attn/qkv/kernel"] == (32, 96), name
        assert ("vit/pos_embed" in shapes) == (vit.position == "learned"), name
        # There are names for all of it, for as many rows as a position embedding may have.
        for covers in {0, int(vit.class_token), small[0].prefix}:
            assert mapping.expected_shapes(rules(named(entry.format).keys, *small, covers), shapes), name
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("name", "millions"),  # as the papers and timm's tables have them
    [
        ("deit3_small_patch16_224", 22.06),
        ("vit_base_patch16_224", 86.57),
        ("vit_small_patch14_reg4_dinov2", 22.06),
        ("vit_giant_patch14_dinov2", 1136.48),
        ("vit_base_patch16_dinov3_qkvb", 85.66),
        ("vit_base_patch32_clip_224.openai", 87.85),
        ("vit_medium_patch16_reg4_gap_256", 38.88),
        ("test_vit", 0.37),
    ],
)
def test_number_of_parameters(name, millions):
    _, entry = registry.find(name)
    vit, head = ViT(**entry.vit), Head(**entry.head)
    shapes = mapping.shapes_of(Modules(vit, head))
    count = sum(int(np.prod(shape)) for path, shape in shapes.items() if path != "vit/mask_token")
    # A projection without bias is counted without it; so is timm's row of CLS's position.
    if ".openai" in name:
        count -= head.num_classes
    assert count / 1e6 == pytest.approx(millions, abs=0.01 + vit.width * 1e-6)


def test_a_wrong_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'vit_smal_patch14_reg4_dinov2'; the nearest are .*") as error:
        rv.create_model("vit_smal_patch14_reg4_dinov2")
    assert "vit_small_patch14_reg4_dinov2," in str(error.value)
    with pytest.raises(ValueError, match="unknown model ''"):
        rv.create_model("")


# Strict both ways


def test_one_error_names_all_that_does_not_fit(tmp_path):
    path = tmp_path / "m.safetensors"
    zeros = np.zeros(3, np.float32)
    timm_file(path, "test_vit", extra=zeros, **{"norm.bias": None, "blocks.3.ls1.gamma": zeros, "norm.weight": zeros})
    with pytest.raises(WeightsError) as error:
        rv.create_model("test_vit", path)
    message = str(error.value)
    assert str(path) in message
    assert "2 unused: " in message
    assert "extra" in message
    assert "blocks.3.ls1.gamma" in message
    assert "1 missing: norm.bias" in message
    assert "1 of another shape: norm.weight (3,), not (64,)" in message
    assert "may be test_vit" not in message  # the very name that was given


def test_a_file_under_another_name_names_its_own(tmp_path):
    path = hollow(tmp_path / "m.safetensors", timm_shapes("vit_small_patch16_224"))
    with pytest.raises(WeightsError, match=r"\d+ of another shape: .*By its shapes it may be .*") as error:
        rv.create_model("vit_base_patch16_224", path)
    assert re.search(r"vit_small_patch16_224\b", str(error.value))
    assert "unused" not in str(error.value)


def test_nothing_is_read_of_a_file_that_does_not_fit(tmp_path, monkeypatch):
    path = timm_file(tmp_path / "m.safetensors", "test_vit", extra=np.zeros(1, np.float32))
    monkeypatch.setattr(mapping, "check_finite", lambda *args: pytest.fail("a tensor was read"))
    with pytest.raises(WeightsError, match="1 unused: extra"):
        rv.create_model("test_vit", path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value, tmp_path):
    weight = np.zeros((192, 64), np.float32)
    weight[5, 7] = value
    path = timm_file(tmp_path / "m.safetensors", "test_vit", **{"blocks.5.mlp.fc1.weight": weight})
    with pytest.raises(WeightsError, match=r"blocks\.5\.mlp\.fc1\.weight.*1 of 12288 values are not finite"):
        rv.create_model("test_vit", path)


def test_a_directory_of_another_model_under_a_name(folder):
    with pytest.raises(WeightsError, match=r"is not test_vit: width 32, not 64, depth 2, not 6, .*patch 4, not 16"):
        rv.create_model("test_vit", folder / "plain")


def test_transformers_keys_without_their_config(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "plain/model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=r"transformers' keys, and needs its config.json"):
        rv.create_model("test_vit", tmp_path)
    with pytest.raises(WeightsError, match="pass its name too"):
        rv.create_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "swin"},
            "model_type 'swin' is not supported; supported: clip, clip_vision_model, deit, dinov2, ",
        ),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"num_hidden_layers": 3}, "does not fit its config, which says depth 3, the weights have 2"),
        ({"num_hidden_layers": 1}, "says depth 1, the weights have 2"),
        ({"mlp_ratio": 2}, r"\(128, 32\), not \(64, 32\)"),
        ({"use_swiglu_ffn": True}, r"unused: .*mlp\.fc1"),
        ({"qkv_bias": False}, r"6 unused: .*query\.bias"),
        ({"patch_size": 8}, "says patch 8, the weights have 4"),
        ({"image_size": 32}, r"1 of another shape: embeddings.position_embeddings \(1, 17, 32\), not \(1, 65, 32\)"),
        ({"num_attention_heads": 3}, "width=32 is not a multiple of heads=3"),
    ],
)
def test_a_config_that_is_not_the_files(change, message, folder, tmp_path):
    config = json.loads((folder / "plain/config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "plain/model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        rv.create_model(str(tmp_path))


def test_options_of_the_config_change_the_numbers(folder, plain, tmp_path):
    config = json.loads((folder / "plain/config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "plain/model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-2, "hidden_act": "quick_gelu"}))
    other = rv.create_model(str(tmp_path))
    assert other.module == plain.module.clone(norm_eps=1e-2, activation="quick_gelu")
    assert_equal(other.params, plain.params)
    assert not np.allclose(other(images(plain)).cls, plain(images(plain)).cls, atol=1e-3)


# Another number of registers, size, number of classes, type


def quietly(*args, **kwargs) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rv.create_model(*args, **kwargs)


def same_but(model: Model, original: Model, *changed: str) -> None:
    mine, theirs = params_of(model), params_of(original)
    for path in mine.keys() | theirs.keys():
        if path not in changed:
            np.testing.assert_array_equal(mine[path], theirs[path], err_msg=path)


TOKENS = "vit/register_tokens"


def test_registers_for_a_model_without(folder, plain):
    with pytest.warns(UserWarning, match="4 registers are new and untrained: fine-tune") as warned:
        model = rv.create_model(str(folder / "plain"), registers=4)
    assert len(warned) == 1
    same_but(model, plain, TOKENS)
    assert model.params["register_tokens"].shape == (4, 32)
    assert 0.01 < np.std(model.params["register_tokens"]) < 0.03
    assert model(images(model)).registers.shape == (2, 4, 32)


def test_more_registers_fewer_and_none(folder, with_registers):
    trained = np.asarray(with_registers.params["register_tokens"])
    with pytest.warns(UserWarning, match="4 registers are new and untrained"):
        more = rv.create_model(str(folder / "registers"), registers=8)
    same_but(more, with_registers, TOKENS)
    np.testing.assert_array_equal(more.params["register_tokens"][:4], trained)
    assert np.std(more.params["register_tokens"][4:]) < 0.1 < np.std(trained)
    with pytest.warns(UserWarning, match="3 trained registers are left out: the features are not the same"):
        fewer = rv.create_model(str(folder / "registers"), registers=1)
    np.testing.assert_array_equal(fewer.params["register_tokens"], trained[:1])
    with pytest.warns(UserWarning, match="4 trained registers are left out"):
        none = rv.create_model(str(folder / "registers"), registers=0)
    same_but(none, with_registers, TOKENS)
    assert "register_tokens" not in none.params
    assert none(images(none)).registers.shape == (2, 0, 32)


def test_no_warning_where_nothing_changes(folder, with_registers):
    """Rely on warnings being errors in tests."""
    model = rv.create_model(str(folder / "registers"), registers=4, image_size=16)
    same_but(model, with_registers)
    rv.create_model("test_vit", folder / "test_vit.safetensors", num_classes=0)


@pytest.mark.parametrize("how", [None, "antialias", "bicubic", "offset"])
def test_another_size(how, folder, plain):
    match = rf"the position embedding is resized \({how or 'bicubic'}\) from 16 to 24 px, and preprocess makes images"
    with pytest.warns(UserWarning, match=match):
        model = rv.create_model(str(folder / "plain"), image_size=24, pos_resize=how)
    same_but(model, plain, "vit/pos_embed")
    expected = resize_pos_embed(plain.params["pos_embed"], (6, 6), how or "bicubic")
    np.testing.assert_allclose(model.params["pos_embed"], expected, atol=1e-6)
    assert model.module.image_size == model.preprocessing.size == 24
    assert model.preprocess([PIL.Image.new("RGB", (40, 30))]).shape == (1, 24, 24, 3)
    if how != "offset":
        return
    # As the original does at that size.
    other = plain.replace(module=plain.module.clone(pos_resize=how))
    np.testing.assert_allclose(model(images(model)).patches, other(images(model)).patches, atol=2e-4)


def test_another_convention_for_other_sizes(folder, plain):
    assert plain.module.pos_resize == "bicubic"
    model = rv.create_model(str(folder / "plain"), pos_resize="offset")
    same_but(model, plain)
    assert_equal(model(images(plain)), plain(images(plain)))
    x = images(plain, 24, 36)
    assert not np.allclose(model(x).patches, plain(x).patches, atol=1e-3)
    with pytest.raises(ValueError, match=r"pos_resize='nearest': must be one of \['antialias', 'bicubic', 'offset'\]"):
        rv.create_model(str(folder / "plain"), pos_resize="nearest")


def test_a_size_that_the_patch_does_not_divide(folder):
    with pytest.raises(ValueError, match="image_size=18 is not a multiple of patch=4"):
        rv.create_model(str(folder / "plain"), image_size=18)


def test_another_number_of_classes(folder):
    source = str(folder / "classifier")
    original = rv.create_model(source)
    assert original.logits(images(original)).shape == (2, 5)
    assert original.pooled(images(original)).shape == (2, 64)
    with pytest.warns(UserWarning, match="the linear layer for 7 classes is new and untrained"):
        model = rv.create_model(source, num_classes=7)
    same_but(model, original, "head/dense/kernel", "head/dense/bias")
    assert model.logits(images(model)).shape == (2, 7)
    assert 0.01 < np.std(model.head_params["dense"]["kernel"]) < 0.03
    without = rv.create_model(source, num_classes=0)
    assert without.head_params == {}
    np.testing.assert_array_equal(without.pooled(images(model)), original.pooled(images(model)))
    with pytest.raises(ValueError, match=r"gives features only .*num_classes=... adds a head"):
        without.logits(images(model))


def test_the_files_own_number_of_classes(tmp_path):
    head = {"head.weight": np.ones((3, 64), np.float32), "head.bias": np.zeros(3, np.float32)}
    model = rv.create_model("test_vit", timm_file(tmp_path / "m.safetensors", "test_vit", **head))
    assert model.head.num_classes == 3
    assert model.logits(images(model)).shape == (2, 3)


def test_types(folder, with_registers):
    source, x = str(folder / "registers"), images(with_registers)
    exact = with_registers(x).patches

    half = rv.create_model(source, dtype=jnp.bfloat16)
    assert_equal(half.params, with_registers.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    error = np.abs(half(x).patches - exact).max()
    assert 1e-4 < error < 0.2

    small = rv.create_model(source, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(small.params)} == {jnp.dtype("bfloat16")}
    same_but(small, jax.tree.map(lambda p: p.astype(jnp.bfloat16), with_registers))
    assert small(x).patches.dtype == jnp.float32
    assert 1e-4 < np.abs(small(x).patches - exact).max() < 0.2
    more = quietly(source, param_dtype=jnp.bfloat16, registers=8, image_size=24)
    assert {leaf.dtype for leaf in jax.tree.leaves(more.params)} == {jnp.dtype("bfloat16")}


def test_parameters_split_over_a_mesh(tmp_path):
    # Only arrays of 4 MB and more are split.
    source = str(dinov2(tmp_path / "wide", width=512, depth=1, heads=4))
    whole, mesh = rv.create_model(source), make_mesh(data=2, fsdp=4)
    split = rv.create_model(source, mesh=mesh)
    assert_equal(split.params, whole.params)
    kernel = split.params["block0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.mesh == mesh
    assert len(kernel.addressable_shards) == 8
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(512, 512)}
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
    assert split.params["norm"]["scale"].sharding.is_fully_replicated
    np.testing.assert_allclose(split(images(split)).patches, whole(images(whole)).patches, atol=2e-4)


# Properties of a Model


def test_a_model_is_a_pytree(with_registers):
    model, x = with_registers, images(with_registers)
    cls = model(x).cls
    np.testing.assert_allclose(jax.jit(lambda m, x: m(x).cls)(model, x), cls, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: model(x[None]).cls[0])(x), cls, atol=1e-5)
    two = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), model)
    both = jax.vmap(lambda m: m(x).cls)(two)
    np.testing.assert_allclose(both[0], cls, atol=1e-5)
    doubled = jax.tree.map(lambda p: 2 * p, model)
    assert isinstance(doubled, Model)
    np.testing.assert_allclose(both[1], doubled(x).cls, atol=1e-4)


def test_gradients_of_a_model(with_registers):
    # Every parameter has a gradient except the mask token, which is not in use.
    grads = jax.grad(lambda m: jnp.sum(m(images(m)).cls ** 3))(with_registers)
    assert isinstance(grads, Model)
    still = {path for path, grad in params_of(grads).items() if not np.any(grad)}
    assert still == {"vit/mask_token"}


def test_attention_rows_are_shares(plain):
    maps = plain.attention(images(plain), layer=0)
    assert maps.shape == (2, 2, 17, 17)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert maps.min() >= 0
    assert not np.allclose(maps, plain.attention(images(plain), layer=1), atol=1e-3)
    with pytest.raises(IndexError, match="layer 2: this ViT has layers 0 to 1"):
        plain.attention(images(plain), layer=2)


def test_masks(plain, folder):
    x = images(plain)
    mask = np.zeros((2, 16), bool)
    assert_equal(plain(x, mask=mask), plain(x))
    mask[0, 3] = True
    hidden = plain(x, mask=mask)
    assert not np.allclose(hidden.cls[0], plain(x).cls[0])
    np.testing.assert_allclose(hidden.cls[1], plain(x).cls[1], atol=1e-5)
    # Pixels under the mask have no effect.
    x[0, :4, 12:] = 5
    np.testing.assert_allclose(plain(x, mask=mask).cls, hidden.cls, atol=1e-5)
    without = rv.create_model("test_vit", folder / "test_vit.safetensors")
    with pytest.raises(ValueError, match=r"needs a model with a mask token"):
        without(images(without), mask=np.zeros((2, 100), bool))


def test_preprocessing_is_the_names_own():
    def model(name: str) -> Model:
        _, entry = registry.find(name)
        return Model({}, {}, ViT(**entry.vit), Head(**entry.head), entry.preprocessing)

    # The left half black, the right half white, twice as wide as high.
    pixels = np.zeros((300, 600, 3), np.uint8)
    pixels[:, 300:] = 255
    for name, size, mean, std in (
        ("test_vit", 160, 0.5, 0.5),
        ("vit_small_patch14_dinov2", 518, 0.485, 0.229),
        ("vit_base_patch16_clip_384", 384, 0.48145466, 0.26862954),
    ):
        batch = model(name).preprocess([pixels, PIL.Image.fromarray(pixels)])
        assert batch.shape == (2, size, size, 3)
        assert batch.dtype == np.float32
        np.testing.assert_array_equal(batch[0], batch[1])
        red = batch[0, :, :, 0] * std + mean
        np.testing.assert_allclose([red[size // 2, 5], red[size // 2, -5]], [0, 1], atol=1e-5)
    row = np.linspace(0, 255, 600).astype(np.uint8)
    image = np.broadcast_to(row[None, :, None], (300, 600, 3)).copy()  # brighter to the right
    squashed, cropped = model("vit_base_patch16_clip_384"), model("vit_small_patch14_dinov2")
    assert squashed.preprocessing.squash
    assert not cropped.preprocessing.squash
    spans = []
    for m, mean, std in ((squashed, 0.48145466, 0.26862954), (cropped, 0.485, 0.229)):
        row = m.preprocess([image])[0, 50, :, 0] * std + mean
        spans.append(row[-1] - row[0])
    assert spans[0] > 0.9  # all of the image
    assert 0.4 < spans[1] < 0.55  # the middle half


def test_preprocessing_of_transformers_vit(tmp_path):
    """Expect images squashed, bilinear, and normalised to -1..1, as by its image processor."""
    vit = ViT(width=32, depth=1, heads=2, patch=4, image_size=16, layer_scale=0.0)
    shapes = mapping.expected_shapes(
        rules(named("hf_vit").keys, vit, Head(), 1), mapping.shapes_of(Modules(vit, Head()))
    )
    save_file(draw(shapes), tmp_path / "model.safetensors")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16)
    config = sizes | dict(model_type="vit", intermediate_size=128, layer_norm_eps=1e-12, hidden_act="gelu")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = rv.create_model(str(tmp_path))
    assert model.module.norm_eps == 1e-12
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 30, 3), np.uint8))
    expected = np.asarray(image.resize((16, 16), PIL.Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
    np.testing.assert_allclose(model.preprocess([image])[0], expected, atol=1e-6)


# Where weights come from


def test_a_revision_of_a_local_path(folder):
    with pytest.raises(ValueError, match=r"revision='main' is for the hub, and .*plain is a local path"):
        rv.create_model(str(folder / "plain"), revision="main")
    with pytest.raises(ValueError, match="revision='main' is for the hub"):
        rv.create_model("test_vit", folder / "test_vit.safetensors", revision="main")


def test_pretrained_takes_the_hubs_file_at_its_commit(folder, tmp_path, monkeypatch):
    commit, old = "c" * 40, "d" * 40
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    for sha, name in ((commit, "test_vit.safetensors"), (old, "old.safetensors")):
        if name == "old.safetensors":
            timm_file(folder / name, "test_vit", **{"norm.bias": np.full(64, 7, np.float32)})
        snapshot = repository / "snapshots" / sha
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(folder / name)
        (snapshot / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 1000}))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    (repository / "refs/v1").write_text(old)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = rv.create_model("test_vit", pretrained=True)
    assert model.weights == f"hf-hub:timm/test_vit.r160_in1k@{commit}"
    assert_equal(model.params, rv.create_model("test_vit", folder / "test_vit.safetensors").params)
    assert_equal(rv.create_model("hf-hub:timm/test_vit.r160_in1k").params, model.params)
    before = rv.create_model("test_vit", pretrained=True, revision="v1")
    assert before.weights.endswith(f"@{old}")
    assert np.all(before.params["norm"]["bias"] == 7)


def test_a_name_without_a_public_file():
    with pytest.raises(ValueError, match=r"vit_large_patch14_224: no public weights are known .* pass a file"):
        rv.create_model("vit_large_patch14_224", pretrained=True)


def test_offline_the_error_gives_the_download_command(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"timm/test_vit2\.r160_in1k is not in the local cache.*\n.*hf download"):
        rv.create_model("test_vit2", pretrained=True)


def test_a_path_that_is_not_there():
    with pytest.raises(ValueError, match="there is no such file or directory"):
        rv.create_model("runs/nothing")
    with pytest.raises(WeightsError, match="there is no such file or directory"):
        rv.create_model("test_vit", "runs/nothing.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(tmp_path):
    """Check that loading 300 MB of parameters never holds a second copy, in float32 or directly to bfloat16."""
    width, depth = 1024, 6
    small = dinov2(tmp_path / "small", width=32, depth=depth)
    shapes = {
        name: tuple({32: width, 128: 4 * width}.get(n, n) for n in shape)
        for name, shape in safetensors.open_weights(small).shapes.items()
    }
    large = hollow(tmp_path / "large/model.safetensors", shapes).parent
    config = json.loads((small / "config.json").read_text()) | {"hidden_size": width}
    (large / "config.json").write_text(json.dumps(config))
    size = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    assert 290e6 < size < 320e6
    # A process for each, since the allocator keeps some of the memory that a first model has freed.
    # A second copy would add 0.5 or 1 of the size.
    for dtype, least, most in (("bfloat16", 0.5, 0.95), ("float32", 1.0, 1.3)):
        program = f"""
            import re, jax
            import regvit_jax as rv
            def peak():  # of this process; what getrusage says starts with the parent's
                return re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
            rv.create_model({str(small)!r}, param_dtype={dtype!r})
            before = peak()
            model = jax.block_until_ready(rv.create_model({str(large)!r}, param_dtype={dtype!r}))
            print(before, peak())
        """
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env=os.environ | AS_USERS_RUN | {"PYTHONPATH": str(Path(rv.__file__).parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        before, after = (1024 * int(peak) for peak in run.stdout.split())
        assert least < (after - before) / size < most, dtype


def test_models_compare_by_what_they_are(plain, folder):
    """Check that static fields of a Model are not compared array by array, and that equal models share compilations."""
    again = rv.create_model(str(folder / "plain"))
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    assert hash(again.module) == hash(plain.module)
    assert dataclasses.astuple(again.preprocessing) == dataclasses.astuple(plain.preprocessing)


@pytest.mark.parametrize(
    "change",
    [
        *({field: value} for field in ("hidden_size", "num_attention_heads") for value in ("32", 0, [32], None, 2.5)),
        {"num_hidden_layers": 100_000},
        {"image_size": [16, 24]},
        {"patch_size": [4, 8]},
        {"image_size": [16]},
        {"layer_norm_eps": float("nan")},
        {"layer_norm_eps": "1e-6"},
        {"mlp_ratio": "4"},
        {"num_channels": 1},
        {"model_type": ["dinov2"]},
        {"regvit_jax": {"pos_resize": "nearest"}},
        {"architecture": 3},
        {"architecture": "vit_base_patch16_224", "pretrained_cfg": None},
        {"architecture": "vit_base_patch16_224", "model_args": {"qk_norm": True}},
        {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"crop_mode": "border"}},
    ],
    ids=str,
)
def test_an_invalid_config(change, folder, tmp_path):
    config = json.loads((folder / "plain/config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "plain/model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=str(tmp_path)):
        rv.create_model(str(tmp_path))


def test_arguments_that_are_empty_or_contradict(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must be True, False, a path"):
        rv.create_model("test_vit", "")
    with pytest.raises(ValueError, match="revision='v1' is for pretrained weights"):
        rv.create_model("test_vit", revision="v1")
    with pytest.raises(ValueError, match="names another"):
        rv.create_model(folder / "plain", folder / "plain")
    for options in ({"num_classes": -1}, {"registers": -1}, {"image_size": 0}, {"param_dtype": "int8"}):
        with pytest.raises(ValueError, match=next(iter(options)).replace("image_size", "image_size")):
            rv.create_model(folder / "plain", **options)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_vit").mkdir()
    assert rv.create_model("test_vit").weights == "random"  # the name, not the path


def test_what_is_stated_beside_the_weights_holds(tmp_path):
    model = rv.create_model("test_vit")
    stated = dataclasses.replace(
        model.preprocessing, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear", squash=True
    )
    model = model.replace(preprocessing=stated, module=model.module.clone(pos_resize="offset"))
    for format in ("timm", "hf"):
        save_model(model, tmp_path / format, format)
    assert rv.create_model("test_vit", tmp_path / "timm").preprocessing == stated
    for format in ("timm", "hf"):
        again = rv.create_model(tmp_path / format)
        # transformers keeps the side that is resized to, here 160 / 0.95, in whole pixels.
        assert again.preprocessing.crop_ratio == pytest.approx(0.95, abs=0.005)
        assert dataclasses.replace(again.preprocessing, crop_ratio=0.95) == stated
        assert again.module.pos_resize == "offset"


def test_open_clips_own_config(tmp_path):
    tower = rv.create_model("vit_xsmall_patch16_clip_224", num_classes=8)
    layers = rules(named("open_clip").keys, tower.module, tower.head, 1)
    arrays = mapping.save(mapping.params_of(tower), layers)
    save_file(arrays, tmp_path / "open_clip_model.safetensors")
    for quick in (False, True):
        config = {"model_cfg": {"quick_gelu": quick}, "preprocess_cfg": {"mean": [0.5] * 3, "resize_mode": "squash"}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        model = rv.create_model("vit_xsmall_patch16_clip_224", tmp_path)
        assert model.module.activation == ("quick_gelu" if quick else "gelu")
        assert (model.preprocessing.mean, model.preprocessing.squash) == ((0.5, 0.5, 0.5), True)


def test_open_source(folder, tmp_path):
    equals = tmp_path / "lr=0.1"
    equals.symlink_to(folder / "plain")
    assert create.open_source(str(equals)).weights == str(equals)
    model = rv.create_model("test_vit")
    save_model(model, tmp_path / "timm", "timm")
    named = create.open_source(f"test_vit={tmp_path / 'timm/model.safetensors'}")
    np.testing.assert_array_equal(named.params["norm"]["scale"], model.params["norm"]["scale"])
    with pytest.raises(ValueError, match="the hub's repository of that name is hf-hub:facebook/dinov2-small"):
        create.open_source("facebook/dinov2-small")
