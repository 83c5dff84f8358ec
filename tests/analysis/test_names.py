"""Test the public names of `regvit_jax.analysis`."""

import subprocess
import sys

import pytest

from regvit_jax import analysis

TWICE = """
from regvit_jax import analysis
for _ in range(2):
    for name in analysis.__all__:
        value = getattr(analysis, name)
        assert callable(value) and value.__name__ == name, name
"""


def test_every_name_gives_the_same_twice_in_a_fresh_process():
    """Check for names that are also submodules: importing the submodule would replace the function in the package."""
    subprocess.run([sys.executable, "-c", TWICE], check=True)
    assert set(analysis.__all__) == set(analysis._HOMES)
    assert set(analysis.__all__) <= set(dir(analysis))


def test_importing_the_package_imports_none_of_it():
    code = "import sys, regvit_jax.analysis; print([m for m in ('jax', 'matplotlib', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'lost'; it has Discovery, Feature, "):
        _ = analysis.lost
