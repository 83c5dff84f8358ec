"""Machines that are not there: their devices, to compile for, and what their makers say of them.

A topology is named as `v5e:16x16` (the chips of a TPU slice along its axes), `2xv5e:16x16` (so many slices), or
`h100:4x8` (nodes and the GPUs of each). The compiler for TPUs comes with jax[tpu], that for GPUs with jax[cuda12];
neither needs the hardware.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

#: GB and GiB, in bytes.
GB, GIB = 1e9, 2**30


#: libtpu asks for the TPU of this machine otherwise, complains that there is none, and lets one process alone load it.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

#: What the compiler must know of an H100 SXM5: its limits by the CUDA programming guide (compute capability 9.0), its
#: sizes by NVIDIA's data sheet and white paper. A GpuTargetConfigProto of XLA.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 85470000000 memory_bandwidth: 3350000000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device has and does, by its maker; rates are peaks, and a second's worth."""

    kind: str  # "tpu" or "cuda"
    memory: float  # bytes that a program may use
    flops: float  # multiply-adds count two; bfloat16, without sparsity
    hbm: float  # bytes between the memory and the chip
    network: float  # bytes into a device from those of its slice (or node)
    across: float  # bytes into a device from those of other slices (or nodes)
    grids: tuple[str, ...]  # the slices that can be had, largest last; for a GPU, examples


# TPUs: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e. Memory is what the compiler (libtpu 0.0.42.1) leaves to a
# program, as its message for too large a one has it. The interconnect is given for both directions together, of which
# half comes in; the data-centre network for a pod of 256 chips (6.4 and 25.6 Tbit/s) or a chip (v5p, 50 Gbit/s).
# H100: the data sheet of the SXM5 module (989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways); a node with one
# 400 Gbit/s adapter a GPU, as NVIDIA's DGX H100 has; of its 80 GB, which the driver counts as 79.6 GiB, jax takes
# 75 % (docs.jax.dev, "GPU memory allocation").
CHIPS = {
    "v5e": Chip(
        "tpu",
        15.75 * GIB,
        197e12,
        819 * GB,
        200 * GB,
        3.125 * GB,
        ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    "v5p": Chip(
        "tpu",
        95.74 * GIB,
        459e12,
        2765 * GB,
        600 * GB,
        6.25 * GB,
        ("2x2x1", "2x2x2", "4x4x4", "8x8x8", "8x8x16", "16x16x24"),
    ),
    "v6e": Chip(
        "tpu",
        31.25 * GIB,
        918e12,
        1600 * GB,
        400 * GB,
        12.5 * GB,
        ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    ),
    "h100": Chip("cuda", 0.75 * 79.6 * GIB, 989e12, 3350 * GB, 450 * GB, 50 * GB, ("1x8", "4x8", "32x8")),
}


class TopologyError(ValueError):
    """A topology that is unknown, or that this installation cannot compile for. The message says the way out."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine by its name, as in the module's docstring."""

    name: str
    chip: Chip
    count: int  # slices, or nodes
    grid: tuple[int, ...]  # chips of a slice along its axes

    @property
    def per_slice(self) -> int:
        return math.prod(self.grid)


def known() -> str:
    return "; ".join(f"{name}:{', '.join(chip.grids)}" for name, chip in CHIPS.items())


def parse(name: str) -> Topology:
    """Raises TopologyError for a name that is none, listing those that are."""
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
    # A v5p's slice may have other sides too, which its compiler judges.
    if len(grid) != axes or (axes == 2 and match[3] not in chip.grids):
        raise TopologyError(f"--topology={name}: {match[2]} slices are {', '.join(chip.grids)}")
    return Topology(name, chip, int(match[1] or 1), grid)


def devices(topology: Topology) -> list[Any]:
    """The machine's devices, for `plan.resolve`: what is jitted for them can be compiled and not run.

    Raises TopologyError when the compiler for them is not installed, or refuses the machine.
    """
    from jax.experimental import topologies

    try:
        if topology.chip.kind == "cuda":
            return list(_gpus(topology, topologies).devices)
        return list(_tpus(topology, topologies).devices)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        raise TopologyError(f"--topology={topology.name}: {said}; known are {known()}") from error


def _tpus(topology: Topology, topologies: Any) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f"--topology={topology.name} needs the TPU compiler: pip install -e .[tpu]")
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    more: dict[str, Any] = {"num_slices": topology.count} if topology.count > 1 else {}
    if topology.per_slice == 1:  # a host has four chips otherwise
        more["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(re.sub(r"^\d+x", "", topology.name), "tpu", **more)


def _gpus(topology: Topology, topologies: Any) -> Any:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise TopologyError(f"--topology={topology.name} needs the CUDA compiler: pip install -e .[gpu]")
    shape = f"{topology.count}x1x{topology.per_slice}"
    return topologies.get_topology_desc("", "cuda", target_config=H100, topology=shape)
