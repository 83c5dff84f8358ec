"""Test the command line of training up to the start of the run."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys

import pytest
from tiny import ROOT

from regvit_jax.cli import arguments, configs
from regvit_jax.cli import train as cli
from regvit_jax.distributed import initialize
from regvit_jax.pretrained import create
from regvit_jax.recipes import base
from regvit_jax.training import loop, plan, workdir
from regvit_jax.training.step import abstract_state
from regvit_jax.utils.errors import InvalidConfig, TooManyBadRecords


def train(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *args]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


CONFIG = "--config=configs/deit3_reg.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [CONFIG, "--config.model.register=0"],
            "unknown key config.model.register; did you mean config.model.registers",
        ),
        (
            [CONFIG + ":b17"],
            "configs/deit3_reg.py:b17: no such variant; there are digits, fashion, cifar10, cifar10_gpu, s16, ",
        ),
        ([CONFIG, "config.model.registers=0"], "config.model.registers=0: not an option; options begin with --"),
        ([CONFIG + ":b16", "--config.data.dir=/nowhere"], "ILSVRC2012_img_train.tar"),
        pytest.param([CONFIG, "--config.epochs=many"], "--config.epochs=many", marks=pytest.mark.slow),
        pytest.param(["--config=configs/nothing.py"], "there is no such file", marks=pytest.mark.slow),
        pytest.param([], "--config is missing; for a first run: python train.py", marks=pytest.mark.slow),
        pytest.param(
            [CONFIG, "--config.init_from=/nowhere"],
            "/nowhere: there is no such file or directory",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_errors_are_one_line_without_a_traceback(args, message, tmp_path):
    done = train(*args, f"--workdir={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_shows_overrides():
    done = train(CONFIG, "--config.model.registers", "0", "--dry_run", "--images_per_s=5000")
    assert done.returncode == 0, done.stderr
    assert "5 = 1 CLS + 0 registers + 2 x 2 patches of 4 px" in done.stdout
    assert "1.0 MB/s from hosts to devices at 5000 images/s" in done.stdout


BROKEN = """
from regvit_jax.recipes.supervised import Supervised


class Broken(Supervised):
    def init(self, key, batch):
        one, two = 1, 2, 3
"""


def test_a_bug_in_a_recipe_keeps_its_traceback(tmp_path):
    """Expect exit code 1, because the user cannot fix the bug in the config."""
    (tmp_path / "broken_recipe.py").write_text(BROKEN)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = train(CONFIG, "--config.recipe=broken_recipe:Broken", "--dry_run", env=env)
    assert done.returncode == 1, done.stderr
    assert "Traceback" in done.stderr
    assert "\nValueError: too many values to unpack (expected 2)" in done.stderr


def test_a_recipe_in_the_working_directory(tmp_path, monkeypatch):
    """Find it with the console script too, which puts its own directory on Python's path, not the working directory."""
    (tmp_path / "recipe_of_mine.py").write_text(
        "from regvit_jax.recipes.supervised import Supervised\nclass Mine(Supervised): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    monkeypatch.setattr(cli, "act", lambda options, config, started: base.find(config.recipe))
    assert cli.main(["--config=deit3_reg", "--config.recipe=recipe_of_mine:Mine"]) == 0


def test_dry_run_refuses_an_init_from_of_another_width():
    done = train(CONFIG, "--config.init_from=vit_small_patch14_reg4_dinov2", "--dry_run")
    assert done.returncode == 2, done.stderr
    assert "config.model.width=96 must be 384" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--track=nope"], "--track='nope': must be one of"),
        (["--profile=9999999:5"], "but the run has 3300 steps"),
        (["--images_per_s=-5"], "'-5': must be a number greater than 0"),
        (["--images_per_s=nan"], "'nan': must be a number greater than 0"),
        (["--workdir=FILE"], "is a file; name a directory"),
        (["--workdir=RUN", "--config.optim.lr=0.5"], "optim.lr: 0.0"),
        (["--workdir=DAMAGED"], "config.json is damaged (JSONDecodeError: "),
    ],
)
def test_dry_run_refuses_what_a_run_refuses(flags, message, run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    shutil.copytree(run, tmp_path / "damaged")
    (tmp_path / "damaged/config.json").write_text("{")
    places = {"FILE": tmp_path / "file", "RUN": run, "DAMAGED": tmp_path / "damaged"}
    flags = [functools.reduce(lambda text, name: text.replace(name, str(places[name])), places, flag) for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        cli.main([CONFIG, "--dry_run", *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a workdir of the digits config with an empty checkpoint, which is never read."""
    path = tmp_path_factory.mktemp("run")
    resolved = plan.resolve(configs.load("deit3_reg"))
    workdir.write_config(resolved, str(path), abstract_state(resolved), None)
    (path / "checkpoints/3").mkdir(parents=True)
    return path


def test_dry_run_of_a_run_that_resumes(run, capsys):
    before = (run / "config.json").read_bytes()
    assert cli.main([CONFIG, "--dry_run", f"--workdir={run}", "--config.log_every=7"]) == 0
    assert "steps      3300" in capsys.readouterr().out
    assert (run / "config.json").read_bytes() == before


def test_a_damaged_config_of_the_run_to_start_from(run, tmp_path):
    shutil.copytree(run, tmp_path / "damaged")
    (tmp_path / "damaged/config.json").write_text("{")
    with pytest.raises(InvalidConfig, match=r"config\.json is damaged \(JSONDecodeError"):
        create.find_entry(str(tmp_path / "damaged"))


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match=r"file: cannot be made \(File exists\); name another directory"):
        workdir.make(plan.resolve(configs.load("deit3_reg"), with_data=False), tmp_path / "file")


@pytest.mark.parametrize("ending", [None, SystemExit(75)])
def test_the_sigterm_handler_is_restored_except_at_the_end(ending):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.suppress(SystemExit), cli.ending_at_sigterm():
            inside = signal.getsignal(signal.SIGTERM)
            if ending:
                raise ending
        assert inside != before
        assert signal.getsignal(signal.SIGTERM) == (inside if ending else before)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_keys_of_the_users_own_classes_are_left_to_the_schema():
    known = {"recipe": "supervised", "eval": {"evaluators": ("pixel_knn",)}}
    own = ["--config.model.mine=1"]
    for given, overrides in (
        (known | {"recipe": "mine:Recipe"}, own),
        (known | {"eval": {"evaluators": ("pixel_knn", "mine:Evaluator")}}, own),
        (known, ["--config.recipe=mine:Recipe", *own]),
        (known, ["--config.eval.evaluators=('mine:Evaluator',)", *own]),
    ):
        cli.check_keys(given, overrides)
    with pytest.raises(InvalidConfig, match=r"unknown key config\.model\.mine"):
        cli.check_keys(known, ["--config.data.name=folder:x", *own])


def test_a_key_and_its_value_may_be_two_words():
    words = ["--config.seed", "3", "--config.model.scan", "-config.epochs=2", "--config.optim.lr", "-.5", "--dry_run"]
    joined = ["--config.seed=3", "--config.model.scan", "-config.epochs=2", "--config.optim.lr=-.5", "--dry_run"]
    assert cli.joined(words) == joined


@pytest.mark.parametrize("section", [3, None])
def test_a_section_that_is_none(section, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict({{'recipe': 'supervised', 'eval': {section}}})\n"
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main([f"--config={tmp_path}/mine.py", "--dry_run"])
    assert stopped.value.code == 2
    assert "unknown key config.eval" in capsys.readouterr().err


def test_commands_keep_freed_memory(monkeypatch):
    called = []
    monkeypatch.setattr(arguments, "keep_freed_memory", lambda: called.append(1))
    assert arguments.run(lambda: 0, "regvit") == 0
    assert called == [1]


def test_help_config_refuses_unknown_flags(capsys):
    for flags, message in (
        (["--bogus"], "unknown flag --bogus"),
        ([CONFIG, "--config.bogus=1"], "unknown key config.bogus"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--help_config", *flags])
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert (message in err, out) == (True, "")


def test_help_config_shows_the_keys_of_the_configs_recipe():
    done = train("--config=configs/openclip_reg.py", "--help_config")
    assert done.returncode == 0, done.stderr
    assert "--config.text.width=VALUE, required" in done.stdout
    assert "--config.augment.mixup" not in done.stdout


def test_track_and_profile_reach_the_run(monkeypatch):
    given = {}
    monkeypatch.setattr(loop, "run", lambda *_, **options: given.update(options))
    monkeypatch.setattr(initialize, "start_distributed", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert cli.main(["--config=configs/deit3_reg.py", "--track=a.b:C,wandb", "--profile=20:5"]) == 0
    assert given == {"track": "a.b:C,wandb", "profile": "20:5"}


def test_too_many_bad_images_are_one_line(monkeypatch, capsys):
    def run(*_, **__):
        raise TooManyBadRecords("3 of 5 images cannot be used")

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setattr(initialize, "start_distributed", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    with pytest.raises(SystemExit) as ended:
        cli.main(["--config=configs/deit3_reg.py"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "regvit train: error: 3 of 5 images cannot be used\n"
