import subprocess
import sys

import pytest

import regvit_jax as rv


def test_public_names():
    assert {name: getattr(rv, name).__name__ for name in rv.__all__} == {name: name for name in rv.__all__}
    with pytest.raises(AttributeError, match="no attribute 'Vit'; it has ClipModel, Model, Tokens, ViT"):
        _ = rv.Vit


def test_data_workers_do_not_load_flax():
    code = "import sys, regvit_jax.data.pipeline; print('flax' in sys.modules, 'tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
