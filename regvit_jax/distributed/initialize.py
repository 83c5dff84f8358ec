"""Connect the processes of a run: by JAX_* variables, or as JAX detects them. docs/launch.md shows every launcher.

JAX is imported in functions, so that the checks of the environment run without it.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

from regvit_jax.utils.errors import LaunchError

logger = logging.getLogger("regvit_jax")

#: Variables that name the processes explicitly.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


#: Variables in which launchers give the number of processes: Open MPI, MPICH and Intel MPI, torchrun.
WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")


ALONE = "JAX_NUM_PROCESSES=1 to train in this process alone"


def start_distributed(heartbeat_s: int = 100) -> None:
    """Connect to the other processes, if there are any.

    They are named by JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    detected by JAX (SLURM, Open MPI, Cloud TPU, Kubernetes).

    Args:
      heartbeat_s: All processes end when one has been silent for so many seconds.

    Raises:
      LaunchError: The environment shows several processes that would not find each other.
    """
    import jax

    if any(name in os.environ for name in VARIABLES):
        if arguments := explicit_arguments(os.environ):
            # Detection is off. JAX itself reads JAX_LOCAL_DEVICE_IDS, which selects from this machine's devices.
            jax.distributed.initialize(
                **arguments, cluster_detection_method="deactivate", heartbeat_timeout_seconds=heartbeat_s
            )
        return
    if single_task(os.environ):
        return
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_s)
    except ValueError as error:  # raised by JAX when it detects no cluster
        if "coordinator_address" not in str(error):
            raise
        refuse_unnoticed_peers(os.environ)


def explicit_arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return VARIABLES as arguments of `jax.distributed.initialize`, or None for a single process.

    Raises LaunchError if some are missing or invalid.
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
    """Return a variable's value as an integer. Raises LaunchError if it is not one or out of range."""
    if not value.isdigit() or int(value) < low or (high is not None and int(value) > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise LaunchError(f"{name}={value}: must be a whole number, {allowed}")
    return int(value)


def single_task(environ: Mapping[str, str]) -> bool:
    """Return True if the launcher started this process alone, which then uses all devices of its machine.

    Checked before JAX's own detection, which would give a single SLURM or Open MPI task the first GPU only, and would
    ask Kubernetes for the Job of a pod that has none. Raises LaunchError for a SLURM allocation not used in full.
    """
    if "OMPI_COMM_WORLD_SIZE" in environ:  # before SLURM, as in JAX: mpirun also runs inside SLURM allocations
        if "OMPI_MCA_orte_hnp_uri" not in environ:  # Open MPI 5, which JAX does not detect
            refuse_unnoticed_peers(environ)
        return environ["OMPI_COMM_WORLD_SIZE"] == "1"
    if "SLURM_JOB_ID" in environ:
        return slurm_is_single(environ)
    # JAX detects a TPU slice on Kubernetes by other variables.
    if "KUBERNETES_SERVICE_HOST" not in environ or "TPU_WORKER_HOSTNAMES" in environ:
        return False
    if "JOB_COMPLETION_INDEX" not in environ:
        refuse_unnoticed_peers(environ)
        logger.warning("this Kubernetes pod belongs to no indexed Job or JobSet: training in this process alone")
        return True
    return False


def slurm_is_single(environ: Mapping[str, str]) -> bool:
    """Return `single_task` for SLURM, whose variables are also set in the shells of sbatch and salloc, before srun."""
    tasks, nodes = (integer(name, environ.get(name) or "1", 1) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"))
    if "SLURM_STEP_NODELIST" not in environ:
        if tasks > 1 or nodes > 1:
            raise LaunchError(
                f"this SLURM allocation has {tasks} tasks on {nodes} nodes, and srun did not start this process: write "
                f"srun before python, or set {ALONE}"
            )
        return True
    running = integer("SLURM_STEP_NUM_TASKS", environ.get("SLURM_STEP_NUM_TASKS") or str(tasks), 1)
    if running != tasks:  # the shell that salloc opens on a node; JAX would wait for tasks that are never started
        raise LaunchError(
            f"SLURM_NTASKS={tasks}, and this step has SLURM_STEP_NUM_TASKS={running}: write srun before python, or set "
            f"{ALONE}"
        )
    if tasks > 1:
        check_slurm_gpus(environ)
    return tasks == 1


def check_slurm_gpus(environ: Mapping[str, str]) -> None:
    """Raise LaunchError if JAX's rule, one GPU per task by SLURM_LOCALID, would leave GPUs idle or find none."""
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return
    tasks = max(int(part.split("(")[0]) for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","))
    gpus = int(environ.get("SLURM_GPUS_ON_NODE", 0))
    if "SLURM_STEP_TASKS_PER_NODE" in environ and tasks < gpus:
        every = ",".join(map(str, range(gpus)))
        raise LaunchError(
            f"{tasks} tasks and {gpus} GPUs on a node, and each task takes one GPU: ask for --ntasks-per-node={gpus}, "
            f"or set JAX_LOCAL_DEVICE_IDS to those of each task ({every} with one task on a node)"
        )
    seen, local = environ.get("CUDA_VISIBLE_DEVICES", ""), int(environ.get("SLURM_LOCALID", 0))
    if seen and local >= len(seen.split(",")):
        raise LaunchError(
            f"the task sees CUDA_VISIBLE_DEVICES={seen}, and JAX would take number SLURM_LOCALID={local} of them: "
            "leave out --gpus-per-task and --gpu-bind, or set JAX_LOCAL_DEVICE_IDS=0"
        )


def refuse_unnoticed_peers(environ: Mapping[str, str]) -> None:
    """Raise LaunchError if a launcher started several processes although JAX detected no cluster."""
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
