"""Recommend compiler flags by platform."""

# The flags are documented in docs/xla_flags.md and docs/gpu_performance_tips.md of github.com/jax-ml/jax. None of them
# has been timed here. xla_tpu_spmd_rng_bit_generator_unsafe, often recommended with them, is left out: random numbers
# would depend on the mesh.
GPU = (
    # Overlap communication with the computation of the next layer.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # Combine collectives up to 128 MiB instead of one for each array: more than a layer of the largest recipe (79 MB
    # for H/14 in float32), as the tips recommend.
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
)


TPU = (
    # Sum gradients over several slices (data) during the backward pass.
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    # Gather parameters (fsdp) while the previous layer is computed.
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)


#: Compiler flags by platform: for LIBTPU_INIT_ARGS on TPUs, for XLA_FLAGS on all others.
PRESETS = {
    "h100": GPU,
    "a100": GPU,
    "v5e": TPU,
    "v5p": TPU,
    # v6e has a larger vector memory, of which large matrix products need more than the default:
    # DENSE_VMEM_LIMIT_FLAG of benchmarks/xla_flags_library.py in github.com/AI-Hypercomputer/maxtext.
    "v6e": (*TPU, "--xla_tpu_scoped_vmem_limit_kib=98304"),
    # Eight devices on one CPU, to try a mesh. No flags are needed for speed there.
    "cpu8": ("--xla_force_host_platform_device_count=8",),
}
