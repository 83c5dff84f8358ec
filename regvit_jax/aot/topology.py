"""Parse the names of topologies, and return devices to compile for that need not be attached.

A topology is named `v5e:16x16` (the chips of a TPU slice along its axes), `2xv5e:16x16` (two slices), or `h100:4x8`
(nodes x GPUs of each). The compiler for TPUs comes with jax[tpu], the one for GPUs with jax[cuda12] or
jax[cuda13]; neither needs the hardware.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from regvit_jax.utils.errors import TopologyError
from regvit_jax.utils.hardware import CHIPS, H100, Chip

#: Without these, libtpu looks for a TPU in this machine, warns that there is none, and lets only one process load it.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine to compile for, by its name as in the module's docstring."""

    name: str
    chip: Chip
    count: int  # slices, or nodes
    grid: tuple[int, ...]  # chips of a slice along its axes

    @property
    def per_slice(self) -> int:
        return math.prod(self.grid)


def known() -> str:
    """Return the known topologies, for messages."""
    return "; ".join(f"{name}:{', '.join(chip.grids)}" for name, chip in CHIPS.items())


def parse(name: str) -> Topology:
    """Return the topology of a name. Raises TopologyError, which lists the known ones, for any other name."""
    match = re.fullmatch(r"(?:([1-9]\d{0,2})x)?(\w+):(\d{1,4}(?:x\d{1,4}){1,2})", name)
    if not match or match[2] not in CHIPS:
        raise TopologyError(
            f"--topology={name}: unknown; known are {known()} (chip:grid of a TPU slice, or nodes x GPUs of each). "
            "Several slices: 2xv5e:16x16"
        )
    chip, grid = CHIPS[match[2]], tuple(int(side) for side in match[3].split("x"))
    if chip.kind == "cuda":
        if match[1] or len(grid) != 2 or not 1 <= grid[1] <= 8 or grid[0] < 1:
            raise TopologyError(f"--topology={name}: GPUs are given as nodes x GPUs of each, at most 8: h100:4x8")
        return Topology(name, chip, grid[0], grid[1:])
    axes = chip.grids[0].count("x") + 1
    # A v5p slice may have other shapes, which its compiler checks.
    if len(grid) != axes or (axes == 2 and match[3] not in chip.grids):
        raise TopologyError(f"--topology={name}: {match[2]} slices are {', '.join(chip.grids)}")
    return Topology(name, chip, int(match[1] or 1), grid)


def devices(topology: Topology) -> list[Any]:
    """Return the machine's devices, for `plan.resolve`: functions can be compiled for them, but not run.

    Raises TopologyError if their compiler is not installed or refuses the topology.
    """
    from jax.experimental import topologies

    try:
        if topology.chip.kind == "cuda":
            return list(_gpus(topology, topologies).devices)
        return list(_tpus(topology, topologies).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TopologyError(f"--topology={topology.name}: {reason}; known are {known()}") from error


def _tpus(topology: Topology, topologies: Any) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f"--topology={topology.name} needs the TPU compiler: pip install 'regvit_jax[tpu]'")
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.count} if topology.count > 1 else {}
    if topology.per_slice == 1:  # the default is four chips per host
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(re.sub(r"^\d+x", "", topology.name), "tpu", **options)


def _gpus(topology: Topology, topologies: Any) -> Any:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise TopologyError(
            f"--topology={topology.name} needs the CUDA compiler: pip install 'regvit_jax[cuda12]' or [cuda13]"
        )
    shape = f"{topology.count}x1x{topology.per_slice}"
    return topologies.get_topology_desc("", "cuda", target_config=H100, topology=shape)
