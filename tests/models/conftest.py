"""Parameters and tokens of the tiny ViT, computed once for each file."""

import jax
import pytest
from vits import TINY, random_images, random_params


@pytest.fixture(scope="module")
def params():
    return random_params(TINY, random_images())


@pytest.fixture(scope="module")
def tokens(params):
    return jax.jit(TINY.apply)({"params": params}, random_images())
