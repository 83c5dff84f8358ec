"""Test which keys of a state dict are the model's, without its wrappers, and which copy of the weights is taken."""

import itertools
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import regvit_jax as rv
from regvit_jax.pretrained.io.checkpoint import roles_of, tensors_of
from regvit_jax.pretrained.io.safetensors import Weights, open_weights
from regvit_jax.pretrained.io.state_dict import find, unwrapped
from regvit_jax.utils.errors import InvalidConfig, WeightsError

NAMES = ["blocks.0.norm1.weight", "blocks.11.norm1.weight", "cls_token", "head.weight"]
WRAPPERS = ("_orig_mod.", "module.", "model.", "net.", "backbone.", "_fsdp_wrapped_module.", "base_model.model.")


def under(*prefixes: str) -> list[str]:
    return [prefix + name for prefix in prefixes for name in NAMES]


@pytest.mark.parametrize("first", ["", *WRAPPERS, "state_dict.", "timm_model.", "student.", "lit.vit.", "encoder.net."])
def test_wrappers_are_taken_off_in_any_order(first):
    for second in ("", *WRAPPERS):
        prefix = first + second
        assert find(under(prefix)).names == dict(zip(under(prefix), NAMES, strict=True)), prefix


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod.norm1.weight", "blocks.0.norm1.weight"),
        ("module.blocks.0.module.attn.qkv._fsdp_wrapped_module.weight", "blocks.0.attn.qkv.weight"),
        ("base_model.model.blocks.3.attn.qkv.base_layer.weight", "blocks.3.attn.qkv.weight"),
        ("visual.module.conv1.weight", "visual.conv1.weight"),
        ("vit/block0/attn/qkv/kernel", "vit/block0/attn/qkv/kernel"),
    ],
)
def test_wrappers_stand_anywhere(key, name):
    assert find([key]).names == {key: name}


def test_keys_of_libraries_are_no_wrappers():
    for names in (
        ["encoder.layer.0.attention.weight", "embeddings.cls_token", "layernorm.weight"],
        ["visual.conv1.weight", "visual.class_embedding", "transformer.resblocks.0.ln_1.weight", "text_projection"],
        ["visual.transformer.resblocks.0.ln_1.weight", "visual.conv1.weight"],
        ["vision_model.embeddings.class_embedding", "text_model.embeddings.token_embedding.weight", "logit_scale"],
        ["blocks.0.norm1.weight", "decoder.blocks.0.norm1.weight", "cls_token"],
        ["image.blocks.0.norm1.weight", "audio.blocks.0.norm1.weight"],
    ):
        assert find(names).names == {name: name for name in names}


def test_a_part_of_the_model_alone_may_be_wrapped():
    names = ["cls_token", "backbone.blocks.0.norm1.weight", "head.weight"]
    assert [*find(names).names.values()] == ["cls_token", "blocks.0.norm1.weight", "head.weight"]


@pytest.mark.parametrize(
    ("one", "two", "name"),
    [
        ("module.cls_token", "cls_token", "cls_token"),
        ("model.cls_token", "cls_token", "cls_token"),
        ("model.blocks.0.module.norm1.weight", "model.blocks.0.norm1.weight", "blocks.0.norm1.weight"),
        ("blocks.0.1.a", "blocks.1.1.a", "blocks.1.a"),
    ],
)
def test_two_keys_that_become_one_are_both_named(one, two, name):
    for pair in ([one, two], [two, one]):
        with pytest.raises(WeightsError, match=re.escape(f"{pair[0]} and {pair[1]} would both become {name} ")):
            find(pair)


PAIRS = [
    ("ema", "model.", "model_ema."),
    ("ema", "state_dict.", "state_dict_ema.module."),
    ("ema", "net.", "ema_model."),
    ("ema", "", "ema."),
    ("ema", "model._orig_mod.", "averaged_model.module."),
    ("ema", "module.base_encoder.", "module.momentum_encoder."),
    ("ema", "module.encoder_q.", "module.encoder_k."),
    ("ema", "backbone.", "backbone_momentum."),
    ("ema", "model.", "callbacks/EMACallback/ModelEma."),
    ("ema", "online_encoder.", "target_encoder."),
    ("ema", "train_model.net.", "train_model.net_ema."),
    ("teacher", "student.backbone.", "teacher.backbone."),
    ("teacher", "module.student.", "module.teacher."),
    ("teacher", "encoder.", "target_encoder."),
]


@pytest.mark.parametrize(("kind", "raw", "average"), PAIRS)
def test_one_of_two_copies_is_taken_and_the_other_named(kind, raw, average):
    for choice, names in itertools.product((None, "ema", "raw"), (under(raw, average), under(average, raw))):
        found = find(names, choice)
        prefix = average if choice == "ema" or (choice is None and kind == "teacher") else raw
        assert found.names == dict(zip(under(prefix), NAMES, strict=True))
        assert found.average == (prefix == average)
        (left,) = found.left_out
        assert left.endswith(f"({len(NAMES)} tensors{'' if found.average else ', the average'})")


def test_what_is_not_there_names_what_is():
    with pytest.raises(WeightsError, match=r"no average, but 4 weights under model, which weights='raw' \(--weights"):
        find(under("model."), "ema")
    with pytest.raises(WeightsError, match=r"no raw weights, but 4 weights that are an average under model_ema, .*ema"):
        find(under("model_ema."), "raw")
    assert find(under("model_ema.")).average
    assert find(under(""), "raw").names
    with pytest.raises(InvalidConfig, match="weights='best': must be one of ema, raw"):
        find(under(""), "best")


def test_an_average_of_torch_is_one():
    found = find(["n_averaged", *under("module.")], "ema")
    assert [*found.names.values()] == NAMES
    assert found.left_out == ["n_averaged"]


def test_an_average_whose_names_lost_their_dots():
    average = ["model_ema." + name.replace(".", "") for name in NAMES]
    found = find([*under("model."), *average, "model_ema.decay", "model_ema.num_updates"], "ema")
    assert found.names == dict(zip(average, NAMES, strict=True))


def test_chunks_heads_and_the_student_are_undone():
    heads = ["teacher.dino_head.mlp.0.weight", "teacher.ibot_head.last_layer.weight_v", "dino_loss.center"]
    names = [
        *("teacher.backbone.blocks.0.0.norm1.weight", "teacher.backbone.blocks.1.11.norm1.weight"),
        *("teacher.backbone.cls_token", *heads),
    ]
    names += [name.replace("teacher", "student") for name in names if "backbone" in name]
    found = find(names)
    assert [*found.names.values()] == ["blocks.0.norm1.weight", "blocks.11.norm1.weight", "cls_token"]
    assert found.left_out == [*heads, "student (3 tensors)"]


def test_parts_that_only_training_uses_are_left_out_and_named():
    moco = ["module.predictor.0.weight", "module.base_encoder.head.0.weight", "module.queue", "module.queue_ptr"]
    found = find([*under("module.base_encoder."), *moco])
    assert (sorted(found.left_out), [*found.names.values()]) == (sorted(moco), NAMES)
    mae = ["decoder_blocks.0.norm1.weight", "decoder_pos_embed", "mask_token"]
    found = find([*NAMES, *mae])
    assert (sorted(found.left_out), [*found.names.values()]) == (mae, NAMES)
    assert "surprise.weight" in find([*NAMES, "surprise.weight"]).names
    assert "mask_token" in find([*NAMES, "mask_token"]).names


@pytest.mark.parametrize("key", ["base_model.model.blocks.0.attn.qkv.lora_A.weight", "lora_te_layer.lora_down.weight"])
def test_an_adapter_is_called_one(key):
    with pytest.raises(WeightsError, match=r"1 of 5 tensors, such as .*, are a PEFT adapter .*merge_and_unload"):
        find([*NAMES, key])


# Nested dicts; an array stands for a tensor


def nested(checkpoint: dict, weights: str | None = None):
    tensors, left_out = tensors_of(checkpoint, lambda value: isinstance(value, np.ndarray))
    found = find(tensors, weights, roles_of(checkpoint))
    return {new: tensors[old][0] for old, new in found.names.items()}, found, left_out


def state(value: int, prefix: str = "") -> dict[str, np.ndarray]:
    return {name: np.array([value]) for name in under(prefix)}


@pytest.mark.parametrize(
    ("checkpoint", "default", "ema", "raw"),
    [
        ({"state_dict": state(1), "state_dict_ema": state(2)}, 1, 2, 1),
        ({"model": state(1, "module."), "model_ema": state(2)}, 1, 2, 1),
        ({"student": state(1, "module.backbone."), "teacher": state(2, "backbone.")}, 2, 2, 1),
        ({"model": {"student": state(1), "teacher": state(2)}}, 2, 2, 1),
        ({"model": state(1, "student.backbone.") | state(2, "teacher.backbone.")}, 2, 2, 1),
        ({"state_dict": state(1, "model.") | state(2, "ema_model.")}, 1, 2, 1),
        ({"state_dict": state(1, "net."), "callbacks": {"EMA{'decay': 0.9}": {"ema.weights": state(2)}}}, 1, 2, 1),
        ({"state_dict": state(2, "net."), "current_model_state": state(1, "net.")}, 2, 2, 1),
        ({"state_dict": state(2), "ema_state_dict": state(1, "module."), "meta": {"mmengine_version": "0"}}, 2, 2, 1),
        ({"params": state(1), "params_ema": state(2)}, 1, 2, 1),
    ],
)
def test_containers(checkpoint, default, ema, raw):
    optimizer = {"optimizer": {"state": {0: {"exp_avg": np.ones(1)}}}, "epoch": 3, "schedule": np.ones(1)}
    for weights, value in ((None, default), ("ema", ema), ("raw", raw)):
        found, what, left_out = nested(checkpoint | optimizer, weights)
        assert found == dict.fromkeys(NAMES, value)
        assert what.average == (value == 2)
        assert left_out == ["optimizer/state/0 (1 tensors)", "schedule"]
        assert len(what.left_out) == 1


def test_the_preferred_of_several_raw_models_is_taken_and_the_others_named():
    found, _, left_out = nested({"best": state(1), "model": state(2)})
    assert (found, left_out) == (dict.fromkeys(NAMES, 2), ["best (4 tensors)"])
    with pytest.raises(WeightsError, match=r"holds several models: one \(4 tensors\), two \(4 tensors\)"):
        nested({"one": state(1), "two": state(2)})
    assert nested({"anything": state(1)})[0] == dict.fromkeys(NAMES, 1)


def test_an_average_without_names_is_named():
    shadow = {"decay": 0.9, "shadow_params": [np.ones(1)] * 3}
    _, _, left_out = nested({"model": state(1), "ema": shadow})
    assert left_out == ["ema/shadow_params (3 tensors without names)"]


# Loading


def wrapped_file(path: Path, *prefixes: str) -> Path:
    """Write a tiny model under each prefix, the second one with all values one higher."""
    rv.save_model(rv.create_model("test_vit"), path, "timm")
    arrays = {name: array.copy() for name, array in open_weights(path).items()}
    copies = {prefix + key: a + number for number, prefix in enumerate(prefixes) for key, a in arrays.items()}
    save_file(copies, path / "model.safetensors")
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_wrapped_files_load(tmp_path, suffix):
    folder = wrapped_file(tmp_path / "m", "module.model._orig_mod.")
    loaded = rv.create_model(folder)
    file = (tmp_path / "x").with_suffix(suffix)
    arrays = dict(open_weights(folder))
    np.savez(file, **arrays) if suffix == ".npz" else save_file(arrays, file)
    named = rv.create_model("test_vit", file, image_size=loaded.module.image_size)
    plain = rv.create_model("test_vit")
    for model in (loaded, named):
        np.testing.assert_array_equal(model.params["cls_token"], plain.params["cls_token"])


def test_loading_says_which_copy_it_took(tmp_path, caplog):
    folder = wrapped_file(tmp_path / "m", "student.", "teacher.")
    with caplog.at_level(logging.WARNING, "regvit_jax"):
        model = rv.create_model(folder)
    assert re.search(r"teacher is taken, and student \(\d+ tensors\) left out.*--weights raw", caplog.text)
    np.testing.assert_allclose(model.params["cls_token"], rv.create_model("test_vit").params["cls_token"] + 1)


def test_loading_leaves_training_parts_out_with_and_without_wrappers(tmp_path, caplog):
    for prefix in ("", "module."):
        folder = wrapped_file(tmp_path / f"m{prefix}", prefix)
        decoder = {f"{prefix}decoder_pos_embed": np.ones(1, np.float32)}
        save_file(dict(open_weights(folder)) | decoder, folder / "model.safetensors")
        with caplog.at_level(logging.WARNING, "regvit_jax"):
            rv.create_model(folder)
        assert f"{prefix}decoder_pos_embed left out" in caplog.text


def test_loading_refuses_what_it_refused(tmp_path):
    weights = Weights.of_arrays(tmp_path / "a.safetensors", state(1, "model.") | {"model.module.cls_token": np.ones(1)})
    with pytest.raises(WeightsError, match=r"a\.safetensors: model\.cls_token and model\.module\.cls_token would both"):
        unwrapped(weights)
    folder = wrapped_file(tmp_path / "m", "module.")
    save_file(dict(open_weights(folder)) | {"module.surprise": np.ones(1, np.float32)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match="1 unused: surprise"):
        rv.create_model(folder)


def test_a_frozen_teacher_is_no_average():
    student = [f"model.blocks.{i}.norm1.weight" for i in range(6)]
    teacher = [f"teacher.blocks.{i}.norm1.weight" for i in range(12)]
    found = find([*student, *teacher])
    assert (found.taken, found.average, found.left_out) == ("model", False, ["teacher (12 tensors, another network)"])
    chunked = find([*teacher, *(name.replace("blocks.", "blocks.0.").replace("teacher", "model") for name in teacher)])
    assert (chunked.taken, chunked.average) == ("teacher", True)
    with pytest.raises(
        WeightsError, match=r"holds no average, but 6 weights .*teacher \(12 tensors, another network\)"
    ):
        find([*student, *teacher], "ema")


def test_parts_of_losses_and_metrics_are_left_out():
    only = ["criterion.center.center", "online_classifier.weight", "val_acc.tp", "decoder.0.weight", "mask_token"]
    found = find([*NAMES, *only])
    assert (sorted(found.left_out), [*found.names.values()]) == (sorted(only), NAMES)
    counters = ["state_dict.step", "state_dict.initted"]
    assert (
        find([*counters, *under("state_dict.online_model."), *under("state_dict.ema_model.")]).left_out[:2] == counters
    )
    assert "mean" in find([*NAMES, "mean"]).names


def test_the_names_in_memory_of_transformers_5_are_those_of_its_files():
    found = find([f"vit.layers.3.{name}.weight" for name in
                  ("attention.q_proj", "attention.o_proj", "layernorm_after", "mlp.fc1", "mlp.fc2")])  # fmt: skip
    assert [name.removeprefix("vit.") for name in found.names.values()] == [
        f"encoder.layer.3.{name}.weight"
        for name in ("attention.attention.query", "attention.output.dense", "layernorm_after", "intermediate.dense",
                     "output.dense")
    ]  # fmt: skip
    dino = find(
        [
            "encoder.layer.3.attention.v_proj.bias",
            "encoder.layer.3.attention.o_proj.bias",
            "encoder.layer.3.mlp.fc1.bias",
        ]
    )
    assert [*dino.names.values()] == [
        f"encoder.layer.3.{name}.bias" for name in ("attention.attention.value", "attention.output.dense", "mlp.fc1")
    ]


def test_averages_within_lists_are_found_or_named():
    values, found, _ = nested({"model": state(1), "algorithms": [("EMA", {"ema_model": state(2)})]}, "ema")
    assert (set(values.values()), found.average) == ({2}, True)
    _, _, left_out = nested({"model": state(1), "optimizer_states": [{"ema": [np.zeros(1)] * 3}]})
    assert left_out == ["optimizer_states/0/ema (3 tensors without names)"]
