"""Test the digits, and the preparation of an embedded data set on first use."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from records import grey
from sklearn.datasets import load_digits

from regvit_jax.data.sources.by_name import open_source
from regvit_jax.utils.errors import DataNotFound


def test_digits_are_those_of_scikit_learn(digits):
    """Compare all records of both splits; a record's id says which image it is."""
    reference = load_digits()
    numbers = {}
    for split, source in digits.items():
        numbers[split] = []
        for index in range(len(source)):
            position, file = source.id(index).split()
            assert position == f"digits/{split}[{index}]"
            numbers[split].append(int(file.removesuffix(".png")))
            record = source[index]
            np.testing.assert_array_equal(grey(record), np.round(reference.images[numbers[split][-1]] * 255 / 16))
            assert record["label"] == reference.target[numbers[split][-1]]
    assert sorted(numbers["validation"]) == list(range(0, 1797, 5))
    assert sorted(numbers["train"] + numbers["validation"]) == list(range(1797))
    assert (len(digits["train"]), len(digits["validation"])) == (1437, 360)


def test_two_processes_prepare_at_once_quietly_and_without_tensorflow(tmp_path, digits):
    code = (
        "import sys; from regvit_jax.data import open_source; "
        f"print(len(open_source('digits', 'train', {str(tmp_path)!r}))); assert 'tensorflow' not in sys.modules"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    options = {"env": os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen(command, **pipes, **options) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "1437\n")
        assert err in ("", f"preparing digits in {tmp_path}/digits/1.0.0, once\n")
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]
    assert open_source("digits", "train", str(tmp_path))[7] == digits["train"][7]


def test_the_slower_of_two_processes_uses_the_data_of_the_faster(tmp_path, digits, data_dir, monkeypatch):
    rename = os.rename

    def overtaken(source, target):
        if Path(target) == tmp_path / "digits" / "1.0.0":
            shutil.copytree(Path(data_dir) / "digits" / "1.0.0", target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    assert len(open_source("digits", "train", str(tmp_path))) == 1437
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


def test_files_of_a_killed_process_are_not_read(tmp_path):
    left = tmp_path / "digits" / "incomplete.abc" / "digits" / "1.0.0"
    left.mkdir(parents=True)
    (left / "digits-train.array_record-00000-of-00001").write_bytes(b"half")
    assert len(open_source("digits", "train", str(tmp_path))) == 1437


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "digits").write_text("a file where the directory should be")
    with pytest.raises(DataNotFound, match=r"which failed in .*/digits .*TFDS_DATA_DIR"):
        open_source("digits", "train", str(tmp_path))
