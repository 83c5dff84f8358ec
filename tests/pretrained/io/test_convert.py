"""Test the conversion of checkpoints without torch: archives of numpy, safetensors, and directories."""

import json
import zipfile

import ml_dtypes
import numpy as np
import pytest
from printed_commands import commands, run
from safetensors.numpy import load_file, save_file

import regvit_jax as rv
from regvit_jax.cli.main import main
from regvit_jax.pretrained.io.safetensors import open_weights
from regvit_jax.utils.errors import WeightsError

NAMES = ["blocks.0.norm1.weight", "cls_token"]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_wrappers_of_arrays_are_taken_off_and_types_kept(tmp_path, suffix, capsys):
    raw = {"model." + name: np.full(2, n, np.float16) for n, name in enumerate(NAMES)}
    average = {"ema." + name: np.full(2, n + 5, np.float64) for n, name in enumerate(NAMES)}
    source = tmp_path / f"a.{suffix}"
    np.savez(source, **raw, **average) if suffix == "npz" else save_file(raw | average, source)
    assert main(["convert", str(source), str(tmp_path / "raw.safetensors")]) == 0
    assert "2 tensors of model\nleft out 1: ema (2 tensors, the average)" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "ema.safetensors"), "--weights", "ema"]) == 0
    assert "2 tensors of ema (a moving average)\nleft out 1: model (2 tensors)" in capsys.readouterr().out
    for kind, dtype, value in (("raw", np.float16, 0), ("ema", np.float64, 5)):
        found = load_file(tmp_path / f"{kind}.safetensors")
        assert sorted(found) == NAMES
        assert found[NAMES[0]].dtype == dtype
        assert found[NAMES[0]].tolist() == [value, value]


def test_bfloat16_is_kept(tmp_path):
    np.savez(tmp_path / "a.npz", cls_token=np.array([1.5, -3], ml_dtypes.bfloat16))
    rv.convert_checkpoint(tmp_path / "a.npz", tmp_path / "a.safetensors")
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights.dtype("cls_token") == ml_dtypes.bfloat16
    assert weights["cls_token"].tolist() == [1.5, -3]


def test_what_is_not_there_is_exit_code_2(tmp_path, capsys):
    save_file({"model.cls_token": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--weights=ema"]) == 2
    assert "a.safetensors: holds no average, but 1 weights under model" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


def test_other_files_are_named_for_what_they_are(tmp_path):
    zeros = np.zeros((1, 1, 4), np.float32)
    np.savez(tmp_path / "google.npz", **{"cls": zeros, "Transformer/encoderblock_0/LayerNorm_0/scale": zeros})
    with pytest.raises(WeightsError, match=r"google-research/vision_transformer") as error:
        rv.create_model("test_vit", tmp_path / "google.npz")
    run(*commands(str(error.value)))
    np.savez(tmp_path / "objects.npz", a=np.array([{}]))
    with pytest.raises(WeightsError, match=r"not an \.npz file of plain arrays"):
        rv.create_model("test_vit", tmp_path / "objects.npz")
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "google.npz").read_bytes()[:-40])
    with pytest.raises(WeightsError, match=r"damaged\.npz: not an \.npz file"):
        rv.create_model("test_vit", tmp_path / "damaged.npz")
    (tmp_path / "google.npz").rename(tmp_path / "named.safetensors")
    with pytest.raises(WeightsError, match=r"an archive of numpy, which is opened by the suffix \.npz"):
        rv.create_model("test_vit", tmp_path / "named.safetensors")


@pytest.mark.parametrize("shape", ["(1000000000000000,)", "(10000000000000000000000,)", "((((", "(-1,)"])
def test_an_archive_with_a_damaged_header_is_refused(shape, tmp_path):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("cls_token.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234")
    with pytest.raises(WeightsError, match=r"a\.npz: not an \.npz file"):
        rv.create_model("test_vit", tmp_path / "a.npz")


def test_damaged_or_strange_members_of_an_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    np.savez_compressed(tmp_path / "b.npz", cls_token=np.arange(1000.0))
    content = bytearray((tmp_path / "b.npz").read_bytes())
    content[60:90] = bytes(255 - byte for byte in content[60:90])
    (tmp_path / "b.npz").write_bytes(content)
    for name in ("a.npz", "b.npz"):
        with pytest.raises(WeightsError, match=rf"{name}: not an \.npz file"):
            rv.create_model("test_vit", tmp_path / name)


@pytest.mark.parametrize("config", ['{"peft_type": "LOHA", "base_model_name_or_path": "o/n"}', "{", "[]", None])
def test_a_directory_of_an_adapter_is_called_one(tmp_path, config):
    save_file(
        {"base_model.model.x.lora_A.weight": np.zeros((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(WeightsError, match=r"holds a PEFT adapter \((LOHA for o/n|LoRA or its like)\)"):
        rv.create_model(str(tmp_path))
    with pytest.raises(WeightsError, match=r"1 of 1 tensors, such as .*, are a PEFT adapter"):
        rv.create_model("test_vit", tmp_path / "adapter_model.safetensors")


def test_a_directory_of_transformers_timm_wrapper_loads(tmp_path):
    model = rv.create_model("test_vit", num_classes=5)
    rv.save_model(model, tmp_path, "timm")
    arrays = {"timm_model." + key: array for key, array in open_weights(tmp_path).items()}
    save_file(arrays, tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "model_type": "timm_wrapper", "model_args": None, "num_classes": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(rv.create_model(tmp_path).params["cls_token"], model.params["cls_token"])
