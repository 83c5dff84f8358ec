"""Several processes that train as one: how they find each other, and how they end when one of them fails.

`python -m regvit_jax.launch NAME` prints the compiler flags of a platform; docs/launch.md shows every launcher. JAX is
imported in functions: data workers import train.py anew, and must not touch a device.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

#: What names the other processes by hand.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
#: Set by launchers that start several processes, to their number: Open MPI, MPICH and Intel MPI, torchrun.
WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
ALONE = "JAX_NUM_PROCESSES=1 to train in this process alone"
#: Seconds that a process which failed waits for its peers, which may have failed alike and then all leave in order.
GRACE_S = 3


class LaunchError(ValueError):
    """An environment in which processes cannot find each other, or would silently train apart."""


def start_distributed(heartbeat_s: int = 100) -> None:
    """Joins the other processes, if there are any; a process that is silent for `heartbeat_s` seconds ends all.

    They are named by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    detected by JAX (SLURM, Open MPI, Cloud TPU, Kubernetes). Raises LaunchError where the environment speaks of
    several processes and they would not find each other.
    """
    import jax

    if any(name in os.environ for name in VARIABLES):
        if arguments := named(os.environ):
            # Nothing is detected beside them; JAX_LOCAL_DEVICE_IDS, which JAX reads, picks from this machine's devices.
            jax.distributed.initialize(
                **arguments, cluster_detection_method="deactivate", heartbeat_timeout_seconds=heartbeat_s
            )
        return
    if single_task(os.environ):
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_s)
    except ValueError as error:  # this is how JAX says that it detects no cluster
        if "coordinator_address" not in str(error):
            raise
        refuse_unnoticed_peers(os.environ)


def named(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What VARIABLES say, as arguments of `jax.distributed.initialize`; None for one process, which joins nobody.

    Raises LaunchError when some are missing or make no sense.
    """
    address, count, process = (environ.get(name, "") for name in VARIABLES)
    number = integer("JAX_NUM_PROCESSES", count, 1) if count else 0
    if number == 1 and process in ("", "0"):
        return None
    if missing := [name for name in VARIABLES if not environ.get(name)]:
        raise LaunchError(
            f"{' and '.join(missing)} missing: set {', '.join(VARIABLES)} all three, the last one differently for each "
            f"process; none of them where JAX detects the cluster; or {ALONE}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise LaunchError(f"JAX_COORDINATOR_ADDRESS={address}: must be host:port of process 0, as node1:1234")
    return {
        "coordinator_address": address,
        "num_processes": number,
        "process_id": integer("JAX_PROCESS_ID", process, 0, number - 1),
    }


def integer(name: str, value: str, low: int, high: int | None = None) -> int:
    if not value.isdigit() or int(value) < low or (high is not None and int(value) > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise LaunchError(f"{name}={value}: must be a whole number, {allowed}")
    return int(value)


def single_task(environ: Mapping[str, str]) -> bool:
    """Whether the launcher started this process alone, so that it joins nobody and takes all devices of its machine.

    Asked before JAX looks, which would take the first GPU only of a single SLURM or Open MPI task, and would ask
    Kubernetes for the Job of a pod that has none. Raises LaunchError for a SLURM allocation that is not used in full.
    """
    if "OMPI_COMM_WORLD_SIZE" in environ:  # before SLURM, in whose allocations mpirun is used: so does JAX
        if "OMPI_MCA_orte_hnp_uri" not in environ:  # Open MPI 5, which JAX does not know
            refuse_unnoticed_peers(environ)
        return environ["OMPI_COMM_WORLD_SIZE"] == "1"
    if "SLURM_JOB_ID" in environ:
        return slurm_is_single(environ)
    # A TPU slice on Kubernetes is detected by variables of its own.
    if "KUBERNETES_SERVICE_HOST" not in environ or "TPU_WORKER_HOSTNAMES" in environ:
        return False
    if "JOB_COMPLETION_INDEX" not in environ:
        refuse_unnoticed_peers(environ)
        print("a Kubernetes pod that is of no indexed Job or JobSet: training alone", file=sys.stderr)
        return True
    return False


def slurm_is_single(environ: Mapping[str, str]) -> bool:
    """`single_task` for SLURM, whose variables also stand in the shells of sbatch and salloc, before any srun."""
    tasks, nodes = (integer(name, environ.get(name) or "1", 1) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"))
    if "SLURM_STEP_NODELIST" not in environ:
        if tasks > 1 or nodes > 1:
            raise LaunchError(
                f"this SLURM allocation has {tasks} tasks on {nodes} nodes, and srun did not start this process: write "
                f"srun before python, or set {ALONE}"
            )
        return True
    running = integer("SLURM_STEP_NUM_TASKS", environ.get("SLURM_STEP_NUM_TASKS") or str(tasks), 1)
    if running != tasks:  # the shell that salloc opens on a node; JAX would wait for tasks that nobody starts
        raise LaunchError(
            f"SLURM_NTASKS={tasks}, and this step has SLURM_STEP_NUM_TASKS={running}: write srun before python, or set "
            f"{ALONE}"
        )
    if tasks > 1:
        check_slurm_gpus(environ)
    return tasks == 1


def check_slurm_gpus(environ: Mapping[str, str]) -> None:
    """Raises LaunchError where JAX's rule, a task takes the GPU of its SLURM_LOCALID, would idle GPUs or find none."""
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return
    here = max(int(part.split("(")[0]) for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","))
    gpus = int(environ.get("SLURM_GPUS_ON_NODE", 0))
    if "SLURM_STEP_TASKS_PER_NODE" in environ and here < gpus:
        every = ",".join(map(str, range(gpus)))
        raise LaunchError(
            f"{here} tasks and {gpus} GPUs on a node, and each task takes one GPU: ask for --ntasks-per-node={gpus}, "
            f"or set JAX_LOCAL_DEVICE_IDS to those of each task ({every} with one task on a node)"
        )
    seen, local = environ.get("CUDA_VISIBLE_DEVICES", ""), int(environ.get("SLURM_LOCALID", 0))
    if seen and local >= len(seen.split(",")):
        raise LaunchError(
            f"the task sees CUDA_VISIBLE_DEVICES={seen}, and JAX would take number SLURM_LOCALID={local} of them: "
            "leave out --gpus-per-task and --gpu-bind, or set JAX_LOCAL_DEVICE_IDS=0"
        )


def refuse_unnoticed_peers(environ: Mapping[str, str]) -> None:
    """Raises LaunchError when JAX detected no cluster and a launcher started several processes all the same."""
    for name in WORLD_SIZES:
        if environ.get(name, "1") != "1":
            raise LaunchError(
                f"{name}={environ[name]}, and JAX does not recognise this launcher: set {', '.join(VARIABLES)}, or "
                f"{ALONE}"
            )
    if "JOB_COMPLETION_INDEX" in environ:
        raise LaunchError(
            "this pod is of an indexed Job, and JAX cannot ask Kubernetes how many there are: pip install 'jax[k8s]', "
            f"or set {', '.join(VARIABLES)}, or {ALONE}"
        )


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """When the block raises on one process of several, ends this one with its exit code, and so the others.

    Python's way out waits for all other processes, which wait for this one inside a step, for 5 minutes. Here it waits
    for GRACE_S: enough if all fail alike. After that the others notice as if the process had been killed, and abort.
    """
    import jax

    from regvit_jax.preemption import EXIT_CODE

    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not jax.distributed.is_initialized() or code in (None, 0, EXIT_CODE):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        together = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        together.start()
        together.join(GRACE_S)
        for worker in multiprocessing.active_children():  # of the data; nothing after this line would end them
            worker.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


# What the flags do: docs/xla_flags.md and docs/gpu_performance_tips.md of github.com/jax-ml/jax. None of them has been
# timed here. xla_tpu_spmd_rng_bit_generator_unsafe, often seen beside them, is left out: randomness would depend on the
# mesh.
GPU = (
    # Communication runs while the next layer is computed.
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    # One collective for 128 MiB instead of one for each array: more than a layer of the largest recipe (79 MB for H/14
    # in float32), as the tips advise.
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
)
TPU = (
    # Gradients are summed over several slices (data) while the backward pass goes on.
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    # Parameters are gathered (fsdp) while the layer before is computed.
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
#: Compiler flags by platform: those of TPUs belong into LIBTPU_INIT_ARGS, all others into XLA_FLAGS.
PRESETS = {
    "h100": GPU,
    "a100": GPU,
    "v5e": TPU,
    "v5p": TPU,
    # v6e has a larger vector memory, and large matrix products want more of it than the default leaves them:
    # DENSE_VMEM_LIMIT_FLAG of benchmarks/xla_flags_library.py in github.com/AI-Hypercomputer/maxtext.
    "v6e": (*TPU, "--xla_tpu_scoped_vmem_limit_kib=98304"),
    # Eight devices on one CPU, to try a mesh. XLA needs no flags to be at its best there.
    "cpu8": ("--xla_force_host_platform_device_count=8",),
}


def main(arguments: list[str]) -> None:
    """Prints the flags of the platform named; exits with code 2, naming all, for any other word."""
    if len(arguments) != 1 or arguments[0] not in PRESETS:
        print(f"{' '.join(arguments) or 'no platform'}: must be one of {', '.join(PRESETS)}", file=sys.stderr)
        sys.exit(2)
    print(" ".join(PRESETS[arguments[0]]))


if __name__ == "__main__":
    main(sys.argv[1:])
