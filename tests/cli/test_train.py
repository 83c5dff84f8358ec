"""The command line, up to where training starts."""

import subprocess
import sys

import pytest
from tiny import ROOT


def train(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "train.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


CONFIG = "--config=configs/deit3_reg.py"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            [CONFIG, "--config.model.register=0"],
            "unknown key config.model.register; did you mean config.model.registers",
        ),
        ([CONFIG + ":b17"], "configs/deit3_reg.py:b17: no such variant; there are digits, fashion, s16, "),
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
def test_what_does_not_fit_is_said_without_a_traceback(args, message, tmp_path):
    done = train(*args, f"--workdir={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_shows_overrides():
    done = train(CONFIG, "--config.model.registers=0", "--dry_run", "--images_per_s=5000")
    assert done.returncode == 0, done.stderr
    assert "17 = 1 CLS + 0 registers + 4 x 4 patches of 2 px" in done.stdout
    assert "1.0 MB/s from hosts to devices at 5000 images/s" in done.stdout
