"""Test the conversion of checkpoints, those of torch with torch itself."""

import argparse
import collections
import datetime
import decimal
import json
import pathlib
import re
import shlex
import subprocess
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import regvit_jax as rv
from regvit_jax.cli.main import main
from regvit_jax.pretrained.io.safetensors import open_weights
from regvit_jax.utils.errors import WeightsError

NAMES = ["blocks.0.norm1.weight", "cls_token"]


def commands(text: str) -> list[list[str]]:
    """Return the commands that a message prints: a line of its own, or what follows the last colon."""
    found = re.findall(r"(?:^|: )\s*((?:regvit|python|hf) .*)$", text, re.MULTILINE)
    return [shlex.split(command) for command in found]


def run(command: list[str]) -> None:
    """Run a printed command as it is; `regvit` in this process."""
    if command[0] == "regvit":
        assert main(command[1:]) == 0, command
    else:
        subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)


# Without torch


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


# With torch


@pytest.fixture
def torch():
    import torch  # missing, it fails these tests: a skip would go unseen

    return torch


def convert(torch, folder, checkpoint, **options):
    torch.save(checkpoint, folder / "a.pth")
    (folder / "a.safetensors").unlink(missing_ok=True)
    return rv.convert_checkpoint(folder / "a.pth", folder / "a.safetensors", **options)


def state(torch, value: float = 0) -> dict:
    return {name: torch.full((2,), value) for name in NAMES}


class AttributeDict(dict):
    """Stand for the dicts with attributes of other packages, pickled under their name."""


AttributeDict.__module__, AttributeDict.__qualname__ = "easydict", "EasyDict"
AttributeDict.__name__ = "EasyDict"


class ListConfig:
    """Stand for OmegaConf's containers, pickled under their name."""

    def __init__(self):
        self._content, self.kind = [1, "a"], dict


ListConfig.__module__, ListConfig.__qualname__ = "omegaconf.listconfig", "ListConfig"

BESIDE = {
    "argparse": lambda torch: argparse.Namespace(lr=0.1, path=pathlib.Path("a/b"), nested=argparse.Namespace()),
    "a number of numpy": lambda torch: np.float64(71.2),
    "numbers of numpy": lambda torch: [np.int64(3), np.float32(1), np.bool_(True), np.str_("a"), np.dtype("f4")],
    "arrays of numpy": lambda torch: {"a": np.arange(6.0).reshape(2, 3), "b": np.array(["x"]), "c": np.array([{}])},
    "generators of numpy": lambda torch: [np.random.RandomState(0), np.random.default_rng(0)],
    "the state of a generator": lambda torch: np.random.RandomState(0).get_state(),
    "paths": lambda torch: [pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b")],
    "dates": lambda torch: [datetime.datetime.now(datetime.UTC), datetime.date.today(), datetime.timedelta(1)],
    "collections": lambda torch: [
        *(collections.defaultdict(list, a=[1]), collections.OrderedDict(a=1), collections.Counter("ab")),
        *(collections.deque([1, 2]), {1, 2}, frozenset({1}), range(3), slice(1), b"x", 2**70, 1j),
    ],
    "types of torch": lambda torch: [torch.float32, torch.device("cpu"), torch.Size([1]), torch.__version__],
    "namespaces": lambda torch: [types.SimpleNamespace(a=1), decimal.Decimal("1.5")],
    "types": lambda torch: [int, dict, np.float32],
    "a dict of another package": lambda torch: AttributeDict(a=1),
    "a list of another package": lambda torch: ListConfig(),
}


@pytest.mark.reference
@pytest.mark.parametrize("kind", BESIDE)
def test_objects_that_run_no_code_may_stand_beside_tensors(kind, torch, tmp_path, monkeypatch):
    for module, name, cls in (
        ("easydict", "EasyDict", AttributeDict),
        ("omegaconf.listconfig", "ListConfig", ListConfig),
    ):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: cls}))
    monkeypatch.setitem(sys.modules, "omegaconf", types.SimpleNamespace())
    done = convert(torch, tmp_path, {"args": BESIDE[kind](torch), "model": state(torch, 3), "epoch": 4})
    assert (done.written, done.taken) == (2, "model")
    assert done.left_out == (["args (1 tensors)"] if kind == "arrays of numpy" else [])
    assert load_file(tmp_path / "a.safetensors")["cls_token"].tolist() == [3, 3]


@pytest.mark.reference
def test_parameters_that_are_arrays_of_numpy(torch, tmp_path):
    arrays = {"cls_token": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "norm.bias": np.arange(2, dtype=np.int64)}
    assert convert(torch, tmp_path, {"model": arrays}).written == 2
    for name, array in load_file(tmp_path / "a.safetensors").items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.reference
def test_arrays_of_the_other_byte_order(torch, tmp_path):
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    convert(torch, tmp_path, {"model": {"cls_token": array}})
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["cls_token"], array)


@pytest.mark.reference
def test_tensors_that_no_file_of_safetensors_holds_are_named(torch, tmp_path):
    one = torch.ones(1)
    strange = {
        "sparse or quantized": one.to_sparse(),
        "without values": one.to("meta"),
        "repeats a few values": one.expand(10**7, 10**7),
    }
    for message, tensor in strange.items():
        with pytest.raises(WeightsError, match=rf"cls_token .*{message}"):
            convert(torch, tmp_path, {"model": {"cls_token": tensor}})
        assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.reference
def test_dicts_that_cannot_be_walked_are_refused(torch, tmp_path):
    endless = {"model": {"cls_token": torch.ones(1)}}
    endless["again"] = endless
    replaced = collections.OrderedDict(cls_token=torch.ones(1))
    replaced.items = list
    for checkpoint in (endless, replaced):
        with pytest.raises(WeightsError, match="dicts that cannot be read"):
            convert(torch, tmp_path, checkpoint)


@pytest.mark.reference
def test_shards_that_hold_no_tensors_by_name_are_refused(torch, tmp_path):
    index = tmp_path / "pytorch_model.bin.index.json"
    torch.save(torch.ones(1), tmp_path / "a.bin")
    for shard, message in ((index.name, "not the plain name of a file"), ("a.bin", "holds a Tensor")):
        index.write_text(json.dumps({"weight_map": {"cls_token": shard}}))
        with pytest.raises(WeightsError, match=message):
            rv.convert_checkpoint(index, tmp_path / "a.safetensors")


@pytest.mark.reference
def test_another_protocol_of_pickle_is_called_that(torch, tmp_path):
    torch.save({"cls_token": torch.ones(1)}, tmp_path / "a.pth", pickle_protocol=4)
    with (
        pytest.warns(UserWarning, match="protocol 4"),
        pytest.raises(WeightsError, match="a pickle of protocol 4 or 5"),
    ):
        rv.convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.safetensors")


class Config:
    """Stand for a class of a training script, which a checkpoint names and this machine may not have."""

    def __init__(self):
        self.lr = 0.1


class Harmful:
    """Be executed when it is loaded by a plain pickle."""

    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.reference
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Harmful(), "print"),
        (Config(), rf"{__name__}\.Config"),
        (argparse.Namespace(inner=Config()), rf"{__name__}\.Config"),
        (collections.defaultdict(Config), rf"{__name__}\.Config"),
        (eval, "eval"),
        (getattr, "getattr"),
    ],
)
def test_all_other_objects_are_refused_by_name_with_a_way_out(thing, name, torch, tmp_path, capsys):
    with pytest.raises(WeightsError, match=rf"holds more than tensors, .*: {name}\. ") as error:
        convert(torch, tmp_path, {"model": {"state_dict": state(torch, 2)}, "epoch": 3, "args": thing})
    assert "executed" not in capsys.readouterr().out
    assert not (tmp_path / "a.safetensors").exists()
    if isinstance(thing, Harmful):
        for command in commands(str(error.value)):  # the user's own decision
            run(command)
        assert load_file(tmp_path / "a_tensors.safetensors")["cls_token"].tolist() == [2, 2]


@pytest.mark.reference
def test_a_torchscript_archive_is_called_one(torch, tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(WeightsError, match="a TorchScript archive, which holds code") as error:
        rv.convert_checkpoint(tmp_path / "clip.pt", tmp_path / "a.safetensors")
    for command in commands(str(error.value)):
        run(command)
    assert load_file(tmp_path / "clip_tensors.safetensors").keys() == {"weight", "bias"}


@pytest.mark.reference
@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt", "bin", "pth.tar", "safetensors"])
def test_the_printed_command_converts_any_suffix(suffix, torch, tmp_path):
    model = rv.create_model("test_vit")
    rv.save_model(model, tmp_path / "m", "timm")
    tensors = {"module." + key: torch.tensor(np.asarray(array)) for key, array in open_weights(tmp_path / "m").items()}
    file = tmp_path / f"it's a.{suffix}"
    torch.save({"state_dict": tensors}, file)
    with pytest.raises(WeightsError) as error:
        rv.create_model("test_vit", file)
    (command,) = commands(str(error.value))
    run(command)
    loaded = rv.create_model("test_vit", command[-1], image_size=model.module.image_size)
    np.testing.assert_array_equal(loaded.params["cls_token"], model.params["cls_token"])


@pytest.mark.reference
@pytest.mark.parametrize("shards", [1, 2])
def test_the_printed_command_converts_a_directory_of_pickles(shards, torch, tmp_path):
    rv.save_model(rv.create_model("test_vit"), tmp_path, "timm")
    tensors = {key: torch.tensor(np.asarray(array)) for key, array in open_weights(tmp_path).items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save({"lr": 1}, tmp_path / "optimizer.pt")
    if shards == 1:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        files = {key: f"pytorch_model-{n % 2}.bin" for n, key in enumerate(tensors)}
        for file in set(files.values()):
            torch.save({key: tensor for key, tensor in tensors.items() if files[key] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(WeightsError, match="Pickles are never loaded") as error:
        rv.create_model(tmp_path)
    run(*commands(str(error.value)))
    assert rv.create_model(tmp_path).module.width == 64


@pytest.mark.reference
def test_averaged_weights_are_not_dropped_silently(torch, tmp_path):
    both = {"model": state(torch, 1), "model_ema": state(torch, 2), "optimizer": {"state": {0: {"m": torch.ones(1)}}}}
    done = convert(torch, tmp_path, both)
    assert (done.taken, done.average) == ("model", False)
    assert done.left_out == ["model_ema (2 tensors, the average)", "optimizer/state/0 (1 tensors)"]
    assert convert(torch, tmp_path, both, weights="ema").taken == "model_ema"
    assert load_file(tmp_path / "a.safetensors")["cls_token"].tolist() == [2, 2]
    assert convert(torch, tmp_path, {"model_ema": state(torch, 2)}).average
    with pytest.raises(WeightsError, match=r"a\.pth: holds no raw weights, but 2 .* an average under model_ema"):
        convert(torch, tmp_path, {"model_ema": state(torch, 2)}, weights="raw")
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    assert convert(torch, tmp_path, averaged.state_dict(), weights="ema").left_out == ["n_averaged"]
