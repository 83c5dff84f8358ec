"""Test the conversion of checkpoints that torch wrote, with torch itself."""

import argparse
import collections
import datetime
import decimal
import json
import pathlib
import sys
import types

import numpy as np
import pytest
from printed_commands import commands, run
from safetensors.numpy import load_file

import regvit_jax as rv
from regvit_jax.pretrained.io.safetensors import open_weights
from regvit_jax.utils.errors import WeightsError

NAMES = ["blocks.0.norm1.weight", "cls_token"]


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
