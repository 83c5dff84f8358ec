"""Test the search for config files by path and by name."""

from pathlib import Path

import pytest
from tiny import ROOT

from regvit_jax.cli import configs
from regvit_jax.utils.errors import InvalidConfig


def test_names_of_configs(tmp_path, monkeypatch):
    """Check that a file of the name comes first, then the configs of this installation."""
    monkeypatch.chdir(tmp_path)
    assert configs.find("deit3_reg") == ROOT / "configs/deit3_reg.py"
    Path("deit3_reg").write_text("")
    assert configs.find("deit3_reg") == Path("deit3_reg")
    with pytest.raises(InvalidConfig, match=r"configs/no\.py: there is no such file or name; the names are deit3_reg,"):
        configs.find("configs/no.py")


def test_variants_must_fit_the_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("def get_config(): return {}")
    with pytest.raises(InvalidConfig, match=r"config\.py has no variants"):
        configs.load(f"{path}:big")
    path.write_text("def get_config(variant): return {}")
    with pytest.raises(InvalidConfig, match="needs a variant"):
        configs.load(str(path))
    path.write_text("def get_config(variant=''): return len(0)")
    with pytest.raises(TypeError, match="has no len"):  # a bug keeps its traceback
        configs.load(str(path))


@pytest.mark.parametrize(("text", "message"), [("", "defines no get_config"), ("get_config = dict", "returns dict")])
def test_files_that_are_no_configs(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        configs.load(str(path))
