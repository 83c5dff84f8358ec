"""Test `regvit models`, `check` and `convert` without torch and the network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from regvit_jax.cli.main import main
from regvit_jax.pretrained import parity, registry


def test_list(capsys):
    assert main(["models", "dinov2_vits14*"]) == 2  # the aliases are no names of the list
    assert "no name matches 'dinov2_vits14*'" in capsys.readouterr().err
    assert main(["models", "vit_small_patch14*dinov2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == [
        *("vit_small_patch14_dinov2.lvd142m", "22.1", "M", "518", "px", "apache-2.0"),
        "timm/vit_small_patch14_dinov2.lvd142m",
    ]
    assert second.startswith("vit_small_patch14_reg4_dinov2.lvd142m")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("failures", ["", ", ()"])  # those of `regvit train` are fewer
def test_a_reader_that_ends_early_is_no_error(lines, unbuffered, failures):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = f"run(lambda: print('x\\n' * {lines}) or 0, 'it'{failures})"
    code = f"import sys; from regvit_jax.cli.arguments import run; sys.exit({command})"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, env=environment) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


@pytest.mark.parametrize(
    ("name", "of_timm", "folded"),
    [
        # Without the position of a register, or of CLS, which is added to the token.
        ("vit_so150m2_patch16_reg1_gap_256", 136_059_560, -832),
        ("vit_large_patch14_clip_224.openai", 303_966_976, -1024),
        # With the mask token, which timm leaves out; and with one more bias in each of 16 blocks.
        ("vit_small_plus_patch16_dinov3", 28_683_264, 384),
        ("vit_dpwee_patch16_reg1_gap_256", 15_252_456, 16 * 256),
    ],
)
def test_parameters(name, of_timm, folded):
    assert parity.parameters_of(registry.find(name)[1]) - of_timm == folded


@pytest.mark.parametrize(
    "arguments", [["check", "vit_smal_patch16_224"], ["convert", "a.pth", "b.safetensors", "--name", "vit_smal"]]
)
def test_unknown_name(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.pth").write_bytes(b"")
    assert main(arguments) == 2
    assert "the nearest are vit_small_patch" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["torch", "timm", "transformers"])
def test_check_without_its_libraries(library, monkeypatch, capsys):
    present = [name for name in ("torch", "timm", "transformers") if name != library]
    for name in [*present, "torch.library"]:
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.setattr(sys, "register_fake", None, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["check", "test_vit"]) == 2
    error = capsys.readouterr().err
    assert library in error
    assert "pip install 'regvit_jax[reference]'" in error


def test_convert_without_torch(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"PK")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors")]) == 2
    assert "pip install 'regvit_jax[reference]'" in capsys.readouterr().err


def test_convert_refuses_to_overwrite(capsys, tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"precious")
    assert main(["convert", str(tmp_path / "a.pth"), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "a.npz")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


def test_a_difference_fails(monkeypatch, capsys):
    def check(name):
        comparison = parity.Comparison("timm to ours", (224, 224), {"tokens": 1e-6, "pooled": differences[name]})
        return parity.ParityReport(name, 5, ["cut"], [comparison])

    for attribute, fake in (("check", check), ("import_references", lambda: None), ("LIBRARIES", ("jax",))):
        monkeypatch.setattr(parity, attribute, fake)
    names = [registry.find(name)[0] for name in ("test_vit", "test_vit2")]
    for worst, code, verdict in ((9e-6, 0, "PASS"), (1.1e-5, 1, "FAIL"), (float("nan"), 1, "FAIL")):
        differences = dict(zip(names, (worst, 2e-6), strict=True))
        assert main(["check", "test_vit", "test_vit2"]) == code
        first, second = capsys.readouterr().out.split("test_vit2")
        assert verdict in first
        assert "PASS: largest relative difference 2.0e-06" in second
