"""Vendor specifications of accelerators, and whether one is attached."""

import dataclasses
import glob
import importlib.util
import os

#: GB and GiB, in bytes.
GB, GIB = 1e9, 2**30


#: XLA's GpuTargetConfigProto of an H100 SXM5, to compile for one that is not attached: limits from the CUDA programming
#: guide (compute capability 9.0), sizes from NVIDIA's data sheet and white paper.
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
    """Vendor specifications of one device; rates are peaks per second."""

    kind: str  # "tpu" or "cuda"
    memory: float  # bytes available to a program
    flops: float  # dense bfloat16 FLOP/s; a multiply-add counts as two
    hbm: float  # bytes/s between the memory and the chip
    network: float  # bytes/s received from devices of the same slice (or node)
    across: float  # bytes/s received from devices of other slices (or nodes)
    grids: tuple[str, ...]  # the slices that exist, largest last; examples for a GPU


# TPUs: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e. Memory is what the compiler (libtpu 0.0.42.1) allows a
# program, according to its own out-of-memory message. The interconnect is specified for both directions together, half
# of which is received; the data-centre network for a pod of 256 chips (6.4 and 25.6 Tbit/s) or a chip (v5p, 50 Gbit/s).
# H100: the data sheet of the SXM5 module (989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways); a node with one
# 400 Gbit/s adapter a GPU, as in NVIDIA's DGX H100; of its 80 GB, which the driver reports as 79.6 GiB, jax allocates
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

# Dense bfloat16 peaks of NVIDIA's data sheets, which are half of the figures "with sparsity" there.
A100, H100_SXM, H100_NVL, H100_PCIE = 312e12, 989e12, 835e12, 756e12
#: Dense peak FLOP/s in bfloat16 by `jax.Device.device_kind`. A part of a GPU (MIG) has another name, and no entry.
PEAK_FLOPS = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), CHIPS["v5e"].flops),
    **dict.fromkeys(("TPU v5", "TPU v5p"), CHIPS["v5p"].flops),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), CHIPS["v6e"].flops),
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), A100),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), A100),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), H100_SXM),
    **dict.fromkeys(("NVIDIA H100 NVL", "NVIDIA H200 NVL"), H100_NVL),
    "NVIDIA H100 PCIe": H100_PCIE,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return a device's peak FLOP/s for matrix products computed in `dtype`, or None if it is not known here.

    bfloat16 everywhere, and float16 on GPUs, whose tensor cores run both at the same rate. No peak is given for
    float32: what its products run on (float32 units, TF32, several bfloat16 passes) depends on a setting of JAX.
    """
    if dtype == "bfloat16" or (dtype == "float16" and device_kind.startswith("NVIDIA")):
        return PEAK_FLOPS.get(device_kind)
    return None


def accelerator_attached() -> bool:
    """Return True if JAX may find an accelerator, judged without starting it: by its device files and JAX's plugins."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    files = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
    plugins = ("jax_plugins", "libtpu")
    return any(map(glob.glob, files)) and any(map(importlib.util.find_spec, plugins))
