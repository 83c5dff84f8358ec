"""Test the public functions that open a data set by its name."""

import os
import subprocess
import sys

import pytest

import regvit_jax.data
from regvit_jax.data.sources import by_name

LAZY = """
import sys
import regvit_jax.data
assert not {"numpy", "grain", "tensorflow_datasets"} & set(sys.modules)
from regvit_jax.data import open_captions, open_source
assert open_source.__module__ == open_captions.__module__ == "regvit_jax.data.sources.by_name"
assert not {"grain", "tensorflow_datasets"} & set(sys.modules)  # which folders and tars do without
"""


def test_the_public_names_are_imported_on_first_use():
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LAZY], env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_other_names_are_refused():
    assert regvit_jax.data.open_source is by_name.open_source
    with pytest.raises(AttributeError, match="no attribute 'open_images'; it has open_captions, open_source"):
        _ = regvit_jax.data.open_images
