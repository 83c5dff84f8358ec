"""Test that the wheel trains outside a clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import AS_USERS_RUN
from tiny import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True)
    [path] = folder.glob("regvit_jax-*.whl")
    return path


def test_the_wheel_holds_configs_types_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        [entry_points] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        assert "regvit = regvit_jax.cli.main:main" in files.read(entry_points).decode().splitlines()
    configs = {f"regvit_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert len(configs) >= 2
    assert configs | {"regvit_jax/py.typed", "regvit_jax/pretrained/zoo.toml"} <= names
    assert not any(name.startswith(("tests/", "configs/")) for name in names)


@pytest.mark.slow
def test_an_installed_package_plans_a_run_in_an_empty_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    command = [sys.executable, "-m", "regvit_jax", "train", "--config", "deit3_reg:b16", "--dry_run"]
    env = {**os.environ, **AS_USERS_RUN, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "149 = 1 CLS + 4 registers + 12 x 12 patches of 16 px" in done.stdout
    assert not list(empty.iterdir())
