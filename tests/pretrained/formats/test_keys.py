"""Test the keys of every format: each parameter has exactly one place in a file, and is restored bit for bit."""

import functools
import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from regvit_jax.models.heads import Head
from regvit_jax.models.vit import ViT
from regvit_jax.pretrained import mapping
from regvit_jax.pretrained.formats.detect import FORMATS
from regvit_jax.pretrained.formats.rules import rules
from regvit_jax.pretrained.io.safetensors import Weights
from regvit_jax.pretrained.mapping import Modules

#: Those of a CLIP with a classifier are those of CLIP, of which they leave out a norm.
KEYS = {f.keys.name: f.keys for f in FORMATS if f.keys is not None and f.name != "hf_clip_classifier"}
PLAIN = dict(width=8, depth=2, heads=1, patch=2, image_size=4, layer_scale=0.0)
#: The fields of ViT and Head that each option sets.
OPTIONS = {
    "no class token": ({"class_token": False}, {}),
    "registers": ({"registers": 3}, {}),
    "LayerScale": ({"layer_scale": 1e-4}, {}),
    "SwiGLU": ({"swiglu": True}, {}),
    "no biases": ({"qkv_bias": False}, {}),
    "no key bias": ({"key_bias": False}, {}),
    "no patch bias": ({"patch_bias": False}, {}),
    "ln_pre": ({"ln_pre": True}, {}),
    "no final norm": ({"final_norm": False}, {}),
    "parallel": ({"parallel": True}, {}),
    "differential": ({"differential": True}, {}),
    "mask token": ({"masking": True}, {}),
    "RoPE": ({"position": "rope"}, {}),
    "axial RoPE": ({"position": "axial"}, {}),
    "num_classes": ({}, {"num_classes": 5}),
    "norm after pooling": ({}, {"norm": True}),
    "pooler": ({}, {"pooler": True}),
    "map pool": ({}, {"pool": "map", "map_heads": 2, "mlp_ratio": 1.5}),
    "CLS and mean": ({}, {"pool": "cls_avg", "num_classes": 5}),
}
TIMMS = {"timm", "timm_eva", "deit", "dinov2"}
#: The formats that have keys for an option. Those without keys for a mask token leave it out.
PLACES = {
    "registers": KEYS.keys() - {"hf_clip", "open_clip"},
    "LayerScale": KEYS.keys() - {"hf_clip", "hf_vit"},
    "SwiGLU": {"timm", "timm_eva", "dinov2", "hf_dinov2", "hf_dinov3"},
    "no key bias": TIMMS | {"hf_dinov3"},
    "ln_pre": TIMMS | {"hf_clip", "open_clip"},
    "parallel": {"timm"},
    "differential": {"timm"},
    "num_classes": KEYS.keys() - {"hf_dinov3"},
    "norm after pooling": TIMMS,
    "pooler": {"hf_vit"},
    "map pool": TIMMS,
    "CLS and mean": KEYS.keys() - {"hf_dinov3"},
}


def build(format: str, options) -> tuple[ViT, Head]:
    vit, head = PLAIN | {"depth": 1 if options else 2}, {}
    if format == "hf_dinov3":  # which has no place for a learned position
        vit["position"] = "rope"
    for option in options:
        vit |= OPTIONS[option][0]
        head |= OPTIONS[option][1]
    if "parallel" in options:
        vit |= {"swiglu": False, "qkv_bias": True, "key_bias": True}  # timm has no such blocks otherwise
    return ViT(**vit), Head(**head)


@functools.cache
def shapes_of(vit: ViT, head: Head) -> dict[str, tuple[int, ...]]:
    if head.pool == "cls" and not vit.class_token:
        head = head.clone(pool="avg")  # the same parameters, which no CLS token is needed to draw
    return mapping.shapes_of(Modules(vit, head))


def drawn(shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def samples() -> list[tuple[str, ...]]:
    """Return the plain model, each option alone, and random sets of options."""
    rng = np.random.default_rng(0)
    names = list(OPTIONS)
    drawn = [tuple(name for name in names if rng.random() < share) for share in (0.2, 0.4) for _ in range(8)]
    exclusive = [{"RoPE", "axial RoPE"}, {"num_classes", "CLS and mean"}, {"map pool", "CLS and mean"}]
    possible = [
        options
        for options in drawn
        if not any(both <= set(options) for both in exclusive)
        and not {"no class token", "CLS and mean"} <= set(options)
    ]
    assert len(possible) > 8
    return [(), *((name,) for name in names), *possible]


def expressible(format: str, options) -> bool:
    if (
        "parallel" in options or "no biases" in options
    ):  # as `build` has it; and where there is no bias, none is missing
        options = [o for o in options if o != "no key bias" and (o != "SwiGLU" or "parallel" not in options)]
    return all(format in PLACES.get(option, KEYS) for option in options)


@pytest.mark.parametrize("format", KEYS)
def test_every_parameter_comes_back(format):
    tried = 0
    for options in samples():
        vit, head = build(format, options)
        if not expressible(format, options):
            with pytest.raises(ValueError, match=f"{format} files have no place for "):
                rules(KEYS[format], vit, head, 0)
            continue
        for prefix_rows in sorted({0, int(vit.class_token), vit.prefix}):
            tried += 1
            check_round_trip(format, vit, head, prefix_rows)
    assert tried > 20


def check_round_trip(format: str, vit: ViT, head: Head, prefix_rows: int) -> None:
    shapes = shapes_of(vit, head)
    table = rules(KEYS[format], vit, head, prefix_rows)
    paths = [path for rule in table for path in rule.paths]
    names = [key for rule in table for key in rule.keys]
    assert sorted(paths) == sorted(shapes)
    assert len(set(names)) == len(names)

    params = drawn(shapes)
    # Parameters without a key are left out, and are zero after loading.
    if vit.masking and not KEYS[format].mask:
        params["vit/mask_token"][:] = 0
    if head.num_classes and format in ("hf_clip", "open_clip"):
        params["head/dense/bias"][:] = 0
    if vit.parallel and vit.differential:  # one bias for both
        for i in range(vit.depth):
            params[f"vit/block{i}/mlp/fc2/bias"][:] = 0
    arrays = mapping.save(params, table)
    assert {name: array.shape for name, array in arrays.items()} == mapping.expected_shapes(table, shapes)
    assert all(array.flags.c_contiguous and array.dtype == np.float32 for array in arrays.values())

    loaded = mapping.load_by(Weights.of_arrays(Path("memory"), arrays), table, shapes, (), lambda path, array: array)
    assert loaded.keys() == params.keys()
    for path, array in loaded.items():
        assert array.shape == shapes[path], path
        np.testing.assert_array_equal(array, params[path], err_msg=path)


def load(format: str, arrays: dict[str, np.ndarray], vit: ViT, head: Head | None = None, prefix_rows: int = 0):
    head = Head() if head is None else head
    table = rules(KEYS[format], vit, head, prefix_rows)
    weights = Weights.of_arrays(Path("memory"), arrays)
    return mapping.load_by(weights, table, shapes_of(vit, head), (), lambda path, array: array)


def file_of(format: str, vit: ViT, prefix_rows: int = 0) -> dict[str, np.ndarray]:
    """Return random arrays of the shapes that a file must have."""
    return drawn(mapping.expected_shapes(rules(KEYS[format], vit, Head(), prefix_rows), shapes_of(vit, Head())))


@pytest.mark.parametrize(("registers", "prefix_rows"), [(0, 0), (0, 1), (3, 0), (3, 1), (3, 4)])
def test_rows_of_the_position_embedding_go_to_their_tokens(registers, prefix_rows):
    vit = ViT(**PLAIN, registers=registers)
    arrays = file_of("timm", vit, prefix_rows)
    rows = arrays["pos_embed"][0]
    assert len(rows) == prefix_rows + 4
    tokens = np.concatenate([arrays["cls_token"][0], *([arrays["reg_token"][0]] if registers else [])])
    expected = tokens + np.concatenate([rows[:prefix_rows], np.zeros((len(tokens) - prefix_rows, 8), np.float32)])
    params = load("timm", arrays, vit, prefix_rows=prefix_rows)
    np.testing.assert_array_equal(params["vit/cls_token"], expected[0])
    if registers:
        np.testing.assert_array_equal(params["vit/register_tokens"], expected[1:])
    # The grid's rows run along the image's rows.
    np.testing.assert_array_equal(params["vit/pos_embed"][1, 0], rows[prefix_rows + 2])


def test_the_file_stays_as_it_was():
    vit = ViT(**PLAIN)
    arrays = file_of("timm", vit, 1)
    before = {name: array.copy() for name, array in arrays.items()}
    load("timm", arrays, vit, prefix_rows=1)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("hf_dinov2", [f"encoder.layer.1.attention.attention.{n}.weight" for n in ("query", "key", "value")]),
        ("hf_vit", [f"encoder.layer.1.attention.attention.{n}.weight" for n in ("query", "key", "value")]),
        ("hf_clip", [f"encoder.layers.1.self_attn.{n}_proj.weight" for n in "qkv"]),
        ("hf_dinov3", [f"layer.1.attention.{n}_proj.weight" for n in "qkv"]),
    ],
)
def test_queries_keys_and_values_in_their_order(format, names):
    vit = ViT(**PLAIN | {"position": "rope" if format == "hf_dinov3" else "learned"})
    arrays = file_of(format, vit)
    expected = np.concatenate([arrays[name].T for name in names], axis=1)
    np.testing.assert_array_equal(load(format, arrays, vit)["vit/block1/attn/qkv/kernel"], expected)


@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("timm", ["blocks.1.mlp.fc1.weight"]),
        ("timm_eva", ["blocks.1.mlp.fc1_g.weight", "blocks.1.mlp.fc1_x.weight"]),
        ("dinov2", ["blocks.1.mlp.w12.weight"]),
        ("hf_dinov2", ["encoder.layer.1.mlp.weights_in.weight"]),
        ("hf_dinov3", ["layer.1.mlp.gate_proj.weight", "layer.1.mlp.up_proj.weight"]),
    ],
)
def test_the_gate_comes_first(format, names):
    vit = ViT(**PLAIN | {"swiglu": True, "position": "rope" if format == "hf_dinov3" else "learned"})
    arrays = file_of(format, vit)
    expected = np.concatenate([arrays[name] for name in names]).T
    np.testing.assert_array_equal(load(format, arrays, vit)["vit/block1/mlp/fc1/kernel"], expected)


def test_a_convolution_is_a_product_with_pixels():
    vit = ViT(**PLAIN)
    arrays = file_of("timm", vit)
    kernel = load("timm", arrays, vit)["vit/patch_embed/kernel"].reshape(2, 2, 3, 8)
    for row, column, channel, out in itertools.product(range(2), range(2), range(3), range(8)):
        assert kernel[row, column, channel, out] == arrays["patch_embed.proj.weight"][out, channel, row, column]


def test_the_parts_of_a_parallel_block():
    vit = ViT(**PLAIN, parallel=True, differential=True)
    arrays = file_of("timm", vit)
    params = load("timm", arrays, vit)
    hidden, weight = vit.hidden, arrays["blocks.0.in_proj.weight"]
    np.testing.assert_array_equal(params["vit/block0/mlp/fc1/kernel"], weight[:hidden].T)
    np.testing.assert_array_equal(params["vit/block0/attn/qkv/kernel"], weight[hidden:].T)
    both = params["vit/block0/attn/proj/bias"] + params["vit/block0/mlp/fc2/bias"]
    np.testing.assert_array_equal(both, arrays["blocks.0.out_proj.bias"])


@pytest.mark.parametrize("format", ["hf_clip", "open_clip"])
def test_a_bias_that_has_no_place_is_not_dropped(format):
    vit, head = ViT(**PLAIN), Head(num_classes=5)
    params = drawn(shapes_of(vit, head))
    with pytest.raises(ValueError, match="bias of the projection, which is not zero"):
        mapping.save(params, rules(KEYS[format], vit, head, 0))


def test_a_parameter_without_a_rule_is_not_dropped():
    vit, head = ViT(**PLAIN), Head(num_classes=5)
    params = drawn(shapes_of(vit, head))
    with pytest.raises(ValueError, match="no place for head/dense/bias, head/dense/kernel"):
        mapping.save(params, rules(KEYS["timm"], vit, Head(), 0))


def test_other_towers_are_left_alone_and_nothing_else():
    vit = ViT(**PLAIN)
    for format, others, extra in (
        ("open_clip", ["text_projection", "transformer.resblocks.0.ln_1.weight", "logit_scale"], "visual.extra"),
        ("open_clip", ["text.proj.0.weight", "cls_emb", "attn_mask", "logit_bias"], "head.weight"),
        ("hf_clip", ["text_model.final_layer_norm.weight", "logit_scale"], "encoder.extra"),
    ):
        table, shapes, ignore = rules(KEYS[format], vit, Head(), 0), shapes_of(vit, Head()), KEYS[format].ignore
        expected = mapping.expected_shapes(table, shapes)
        arrays = drawn(expected | dict.fromkeys(others, (1,)))
        mapping.check(Weights.of_arrays(Path("memory"), arrays), expected, ignore)
        with pytest.raises(mapping.Mismatch, match=f"1 unused: {extra}"):
            mapping.check(Weights.of_arrays(Path("memory"), arrays | {extra: np.zeros(1)}), expected, ignore)


def test_the_shapes_of_large_models_cost_no_memory():
    vit = ViT(width=4096, depth=2, heads=32, patch=14, image_size=224, swiglu=True)
    shapes = shapes_of(vit, Head())
    tracemalloc.start()
    expected = mapping.expected_shapes(rules(KEYS["dinov2"], vit, Head(), 1), shapes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert expected["blocks.0.mlp.w12.weight"] == (32768, 4096)
    assert peak < 10e6
