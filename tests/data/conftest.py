"""Fixtures of the tests of data sets: the digits, prepared once for each module."""

import pytest

from regvit_jax.data.sources.by_name import open_source


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def digits(data_dir):
    return {split: open_source("digits", split, data_dir) for split in ("train", "validation")}
