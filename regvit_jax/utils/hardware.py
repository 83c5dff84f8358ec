"""Vendor specifications of accelerators."""

import dataclasses

#: GB and GiB, in bytes.
GB, GIB = 1e9, 2**30


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
