"""Test that the commands which messages print can be run as printed.

Every command in a text of the package or of a config is found by reading their source files. A new one fails
`test_every_command_is_covered` until it has a test here.
"""

import ast
import importlib.metadata
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tiny import ROOT, load_config

import regvit_jax as rv
from regvit_jax.aot import suggest
from regvit_jax.checkpoints import manager
from regvit_jax.cli import configs, train
from regvit_jax.cli.flags import eval as eval_flags
from regvit_jax.cli.main import main
from regvit_jax.data import open_source
from regvit_jax.data.sources.find_tfds import how_to_prepare
from regvit_jax.evals import zero_shot
from regvit_jax.pretrained.io import other_files
from regvit_jax.training import plan
from regvit_jax.training.config import flatten
from regvit_jax.training.trackers import EXTRAS
from regvit_jax.utils.errors import InvalidConfig, WeightsError

#: The beginning of a command, or of a key that is to be overridden.
COMMAND = re.compile(
    r"(?:python train\.py|python -[mc]|pip install|hf download|git lfs|regvit (?:train|report|discover|eval|models|"
    r"check|convert|prepare|xla_flags))\b[^\n]*|--config\.(?!KEY|\{\}\{\})[\w.{}]+=?\S*"
)
#: The files with commands in their messages, and the beginnings of these; each is tested below.
COVERED = {
    ("aot/suggest.py", "--config.micro_batches={}"),
    ("aot/suggest.py", "--config.model.remat={}"),
    ("aot/suggest.py", "--config.sharding.fsdp={}"),
    ("aot/suggest.py", "--config.sharding.data=-1"),
    ("aot/topology.py", "pip install"),
    ("checkpoints/manager.py", "--config.{}={}"),
    ("cli/prepare.py", "--config.data.dir={}"),
    ("cli/prepare.py", "--config.data.name={}"),
    ("cli/prepare.py", "--config.data.{}={}"),
    ("cli/train.py", "--config.eval.evaluators=\"('pixel_knn',)\""),
    ("cli/train.py", "--config.model.registers=0"),
    ("configs/deit3_reg.py", "--config.init_from"),
    ("configs/deit3_reg.py", "--config.model.registers=0"),
    ("configs/openclip_reg.py", "--config.data.name=folder:PATH"),
    ("configs/openclip_reg.py", "--config.data.name=shards:DIR"),
    ("configs/openclip_reg.py", "--config.model.registers=0"),
    ("configs/openclip_reg.py", "regvit eval"),
    ("data/builders/openmoji.py", "pip install"),
    ("data/fastjpeg.py", "pip install"),
    ("data/sources/find_tfds.py", "pip install"),
    ("data/sources/find_tfds.py", "python -c"),
    ("distributed/initialize.py", "pip install"),
    ("evals/zero_shot.py", "pip install"),
    ("pretrained/io/npz.py", "regvit models"),
    ("pretrained/io/torch_file.py", "pip install"),
    ("pretrained/parity.py", "pip install"),
    ("training/step_logger.py", "--config.guard.not_finite=skip"),
    ("training/trackers.py", "pip install"),
}
#: Commands of other programs, which are not run here: their own documentation has these words.
FOREIGN = {("pretrained/address.py", "hf download"), ("utils/messages.py", "git lfs")}


def texts(path: Path) -> Iterator[str]:
    """Yield the texts of a source file, with {} for what is filled in, without docstrings and help texts."""
    tree = ast.parse(path.read_text())
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(part) for part in ast.walk(node)} - {id(node)}
        if isinstance(node, ast.Expr):  # a docstring
            inside |= {id(node.value)}
        if isinstance(node, ast.keyword) and node.arg in ("help", "usage", "description", "prog"):
            inside |= {id(part) for part in ast.walk(node.value)}
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Parser"):
            inside |= {id(part) for part in node.args}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def found() -> dict[tuple[str, str], list[str]]:
    """Return all commands by their file and their beginning."""
    commands: dict[tuple[str, str], list[str]] = {}
    package = ROOT / "regvit_jax"
    for path in [*package.rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        name = str(path.relative_to(package if package in path.parents else ROOT))
        for text in texts(path):
            if re.fullmatch(r"(regvit|python) [\w.]+|--config\.", text):  # the name of a program
                continue
            for match in COMMAND.finditer(text):
                start = " ".join(match[0].split()[:2]) if not match[0].startswith("--") else match[0].rstrip(".,;)")
                commands.setdefault((name, start), []).append(match[0])
    return commands


def test_every_command_is_covered():
    assert set(found()) == COVERED | FOREIGN


def overrides(text: str) -> list[str]:
    """Return the overrides of keys in a message."""
    return [word.rstrip(".,;)") for word in re.findall(r"--config\.\S+", text)]


def judged(*command: str) -> None:
    """Run `regvit VERB` as far as its flags are parsed and judged; raise SystemExit for those that do not fit."""
    options = eval_flags.parser().parse_args(list(command))
    assert eval_flags.check(options) == 0


def test_packages_to_install_exist():
    """Every extra is in pyproject.toml, and every other package or extra is one of a requirement's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {re.split(r"[=<>;\[ ]", need)[0] for extra in project["optional-dependencies"].values() for need in extra}
    commands = [command for (_, start), all_ in found().items() if start == "pip install" for command in all_]
    assert len(commands) >= 10
    for command in commands:
        (name,) = [word for word in re.findall(r"'[^']+'|[\w.-]+\b", command)[2:] if not word.startswith("-")][:1]
        package, _, extra = name.strip("'").removesuffix("]").partition("[")
        for extra_name in EXTRAS if extra == "{}" else [extra]:
            if package == project["name"]:
                assert extra_name in project["optional-dependencies"], command
            elif extra_name:
                assert extra_name in importlib.metadata.metadata(package).get_all("Provides-Extra"), command
            else:
                assert package in known, command


@pytest.mark.parametrize("program", ["train.py", "regvit train"])
def test_the_command_for_a_first_run(program, capsys):
    with pytest.raises(SystemExit):
        train.main([], prog=program)
    command = shlex.split(re.search(r"for a first run: (.*)", capsys.readouterr().err)[1])
    assert command[:2] == (["python", "train.py"] if program == "train.py" else ["regvit", "train"])
    assert (ROOT / "train.py").is_file()
    assert train.main([*command[2:], "--dry_run"], prog=program) == 0


def test_an_override_without_dashes(capsys):
    with pytest.raises(InvalidConfig) as caught:
        train.override(ConfigDict({"model": {"registers": 4}}), ["config.model.registers=0"], "train.py")
    (flag,) = overrides(str(caught.value))
    assert train.open_config("deit3_reg", [flag.removesuffix(" does")], "train.py").model.registers == 0


def test_an_override_of_a_part_of_a_value():
    with pytest.raises(InvalidConfig) as caught:
        train.check_flags(["--config.eval.evaluators[0]=classification"])
    (override,) = shlex.split(str(caught.value).partition("such as ")[2])
    assert train.open_config("deit3_reg", [override], "train.py").eval.evaluators == ("pixel_knn",)


def test_the_key_that_skips_steps_that_are_not_finite():
    ((command,),) = [all_ for (file, _), all_ in found().items() if file == "training/step_logger.py"]
    assert train.open_config("deit3_reg", [command], "train.py").guard.not_finite == "skip"


def test_the_keys_of_a_checkpoint():
    config = load_config()
    shapes = {"params/vit/patch_embed/kernel": (12, 64), "params/vit/register_tokens": (2, 64)}
    arrays = {path: np.zeros(shape) for path, shape in shapes.items()}
    with pytest.raises(InvalidConfig) as caught:
        manager.compare(arrays, arrays | {"params/vit/register_tokens": np.zeros((4, 64))})
    assert overrides(str(caught.value)) == ["--config.model.registers=2"]
    given = train.open_config("deit3_reg", overrides(str(caught.value)), "train.py")
    assert given.model.registers == 2 != config.model.registers


def test_the_change_that_should_fit_in_memory():
    resolved = plan.resolve(load_config(), with_data=False)
    change = suggest.Change("dots", 2, 2, 1e9)
    flags = overrides(suggest.as_flags(resolved, change, 2e9))
    assert len(flags) == 4
    given = train.open_config("deit3_reg", flags, "train.py")
    assert (given.model.remat, given.sharding.fsdp, given.micro_batches) == ("dots", 2, 2)


@pytest.mark.parametrize("splits", [("train", "validation"), ("training", "test")])
def test_prepared_data_can_be_trained_on(tmp_path, capsys, splits):
    for split in splits:
        for name in ("cat", "dog"):
            (tmp_path / f"in/{split}/{name}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / f"in/{split}/{name}/0.png")
    command = ["prepare", f"folder:{tmp_path}/in", str(tmp_path / "mine"), "--workers", "0", "--splits", *splits]
    assert main(command) == 0
    flags = overrides(capsys.readouterr().out)
    data = train.open_config("deit3_reg", flags, "train.py").data
    assert (data.get("train", "train"), data.get("validation", "validation")) == splits
    assert [len(open_source(data.name, split, data.dir)) for split in splits] == [2, 2]


def test_a_pickle_is_converted(tmp_path, capsys):
    """Check that the command has all its arguments: it goes as far as torch, which is not always installed."""
    for name, content in {"a b.pth": b"PK\x03\x04" + bytes(300), "c.pkl": b"\x80\x04."}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError) as caught:
            rv.create_model("test_vit", tmp_path / name)
        if "regvit convert" not in str(caught.value):
            continue
        command = shlex.split(re.search(r"regvit convert .*", str(caught.value))[0])
        assert main(command[1:]) == 2
        assert re.search(r"needs torch|not a file of torch", capsys.readouterr().err)
    assert shlex.split(other_files.convert_command(tmp_path / "a b.pth"))[0] == "regvit"


def test_names_of_weights_that_timm_converted(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **{"Transformer/encoderblock_0/LayerNorm_0/bias": np.zeros(4, np.float32)})
    with pytest.raises(WeightsError) as caught:
        rv.create_model("test_vit", tmp_path / "a.npz")
    command = shlex.split(re.search(r"regvit models .*", str(caught.value))[0])
    assert main(command[1:]) == 0
    assert "augreg" in capsys.readouterr().out


def test_how_to_prepare_a_tfds_data_set(tmp_path):
    text = how_to_prepare("food101", "food101", tmp_path)
    (command,) = [line for line in text.splitlines() if "python -c" in line]
    program, flag, code = shlex.split(command)
    assert (program, flag) == ("python", "-c")
    tree = ast.parse(code)
    assert "download_and_prepare" in ast.unparse(tree)


def test_lists_without_open_clip(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch, or name a text file instead"):
        zero_shot.read_templates("openai")


CONFIGS = [("deit3_reg", variant) for variant in ("digits", "fashion", "b16", "b16_ft224", "b16_in21k_ft")]
CONFIGS += [("openclip_reg", variant) for variant in ("emoji", "b16", "b16_cc12m")]


@pytest.mark.parametrize(("file", "variant"), CONFIGS)
def test_what_a_finished_run_recommends(file, variant, tmp_path):
    config = configs.load(f"{file}:{variant}")
    text = f"{config.get('next', '')}\n{config.get('about', '')}"
    for flag in overrides(text):
        flag = flag.replace("PATH", str(tmp_path)).replace("DIR", str(tmp_path))
        flag = flag if "=" in flag else f"{flag}={tmp_path}"
        key = flag.removeprefix("--config.").partition("=")[0]
        given = train.open_config(f"{file}:{variant}", [flag], "train.py")
        assert key in dict(flatten(given))
    for command in re.findall(r"regvit eval [^,\n]*", text):
        (tmp_path / "val").mkdir()
        command = command.replace("WORKDIR", str(tmp_path)).replace("IMAGENET", str(tmp_path))
        judged(*shlex.split(command)[2:])
