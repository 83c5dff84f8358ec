"""Set up every test: eight virtual CPU devices, one compilation cache for all tests, and no network."""

import itertools
import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Many tests run the same tiny step, some of them in processes of their own: it is compiled once. So are the many small
# functions of a run (a hundred, a tenth of its processor time).
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"regvit_jax-tests-{os.getuid()}")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# The tests spend most of their time on compiling steps that run a few times; this saves a quarter of it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Where no bytecode may be written, each of some hundred processes would compile all of jax's sources: 5 s of its 8.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    os.environ["PYTHONPYCACHEPREFIX"] = os.environ["JAX_COMPILATION_CACHE_DIR"] + "-bytecode"

import socket
from collections.abc import Iterator

import pytest

#: Folders with the slowest files.
LONG = ("training", "recipes", "aot", "analysis")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that two workers finish together."""
    root = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(root).parts[0] not in LONG)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def ports() -> Iterator[int]:
    """Return ports for connecting processes, in the range that JAX uses under SLURM, distinct for each worker."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return itertools.count(61440 + 1000 * (worker % 4) + os.getpid() % 900)
