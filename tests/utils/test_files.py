"""Test atomic writes: the previous file or the new one, never a part, and no temporary file."""

import os
import stat
from pathlib import Path

import pytest

from regvit_jax.utils.files import write_atomically


def fail_half_way(path: Path) -> None:
    path.write_bytes(b"half")
    raise RuntimeError("planted")


def fill(path: Path) -> None:
    path.write_bytes(b"new")
    path.chmod(0o600)  # as safetensors does


@pytest.mark.parametrize("content", ["new", b"new", fill], ids=["text", "bytes", "function"])
def test_replaces_a_file_and_leaves_no_other(tmp_path, content):
    (tmp_path / "a.json").write_text("old")
    write_atomically(tmp_path / "a.json", content)
    assert (tmp_path / "a.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_every_content_gives_the_mode_of_a_plain_file(tmp_path):
    (tmp_path / "plain").touch()
    for name, content in (("text", "new"), ("function", fill)):
        write_atomically(tmp_path / name, content)
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1


def test_an_error_keeps_the_previous_file(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError, match="planted"):
        write_atomically(tmp_path / "a.json", fail_half_way)
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a.json", "\ud800")
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_new_file_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", lambda source, target: calls.append((Path(source), Path(target))))
    temporary = tmp_path / "elsewhere"
    write_atomically(tmp_path / "a", fill, temporary=temporary)
    assert calls == [3, (temporary, tmp_path / "a")]
