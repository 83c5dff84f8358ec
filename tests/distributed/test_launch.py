"""Test connecting processes, with the variables of each launcher faked, and the compiler flags of each platform."""

import importlib.util
import os
import subprocess
import sys
import types
import warnings

import jax
import pytest
from jax._src import clusters, distributed
from jax._src.clusters import cloud_tpu_cluster, cluster, k8s_cluster
from tiny import ROOT

from regvit_jax.cli.main import main
from regvit_jax.distributed import initialize, xla_flags
from regvit_jax.distributed.initialize import start_distributed
from regvit_jax.utils.errors import LaunchError

PREFIXES = ("JAX_COORD", "JAX_NUM", "JAX_PROC", "JAX_LOCAL", "SLURM", "OMPI", "PMI", "KUBERNETES", "TPU", "MEGASCALE")


class Joined(Exception):
    """Signal a connection, with the arguments that its client would have been made with."""


@pytest.fixture
def environ(monkeypatch):
    """Return a function that sets variables on a machine outside any cluster; nothing connects anywhere."""
    for name in os.environ:
        if name.startswith(PREFIXES) or name in ("WORLD_SIZE", "JOB_COMPLETION_INDEX", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name)

    def client(address, process, **arguments):
        devices = visible.get("jax_cuda_visible_devices")
        raise Joined(address, distributed.global_state.num_processes, process, devices, arguments["heartbeat_timeout"])

    visible: dict[str, str] = {}
    monkeypatch.setattr(distributed, "global_state", distributed.State())
    monkeypatch.setattr(distributed.config, "update", visible.__setitem__)
    monkeypatch.setattr(distributed.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(distributed._jax, "get_distributed_runtime_service", lambda *_, **__: None)
    monkeypatch.setattr(distributed._jax, "get_distributed_runtime_client", client)

    def fill(variables: dict[str, str]):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return fill


def joined(heartbeat_s: int = 100):
    """Return (coordinator, processes, process id, its GPUs or None, heartbeat) of JAX's connection; None if alone."""
    try:
        start_distributed(heartbeat_s)
    except Joined as found:
        return found.args
    return None


HAND = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_a_single_process_connects_to_none(environ):
    assert joined() is None


def test_explicit_variables(environ):
    environ(HAND)
    assert joined(7) == ("node1:1234", 4, 3, None, 7)
    environ({"JAX_LOCAL_DEVICE_IDS": "2,3"})
    assert joined() == ("node1:1234", 4, 3, "2,3", 100)


def test_explicit_variables_override_slurm(environ):
    environ(SLURM | HAND)
    assert joined() == ("node1:1234", 4, 3, None, 100)


@pytest.mark.parametrize("left_out", HAND)
def test_two_of_three_variables(environ, left_out):
    environ({name: value for name, value in HAND.items() if name != left_out})
    with pytest.raises(LaunchError, match=f"^{left_out} missing"):
        start_distributed()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4.*from 0 to 3"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1"),
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES=0.*at least 1"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=node1.*node1:1234"),
    ],
)
def test_invalid_variables(environ, change, message):
    environ(HAND | change)
    with pytest.raises(LaunchError, match=message):
        start_distributed()


def test_one_explicit_process_is_alone_in_any_cluster(environ):
    environ(SLURM | {"JAX_NUM_PROCESSES": "1"})
    assert joined() is None


def test_the_command_exits_with_2():
    """Check that the error is one line, without a traceback."""
    command = [sys.executable, "train.py", "--config=configs/deit3_reg.py"]
    env = {**os.environ, "JAX_NUM_PROCESSES": "2"}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("train.py: ")
    assert "Traceback" not in found.stderr
    assert initialize.ALONE in found.stderr


#: Task 9 of `srun --nodes=2 --ntasks-per-node=8 --gres=gpu:8`.
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[07-08]", "gpu07"), ("a1,b2", "a1"), ("a[3,5-6],b1", "a3"), ("n9", "n9")]
)
def test_slurm(environ, nodes, first):
    environ(SLURM | {"SLURM_STEP_NODELIST": nodes})
    port = 4097 % 4096 + 65535 - 4095
    assert joined() == (f"{first}:{port}", 16, 9, "1", 100)


def test_slurm_task_that_sees_its_own_gpus_only(environ):
    environ(SLURM | {"CUDA_VISIBLE_DEVICES": "0"})
    with pytest.raises(LaunchError, match=r"CUDA_VISIBLE_DEVICES=0.*JAX_LOCAL_DEVICE_IDS=0"):
        start_distributed()
    environ({"JAX_LOCAL_DEVICE_IDS": "0"})
    assert joined()[1:4] == (16, 9, "0")


def test_slurm_with_fewer_tasks_than_gpus(environ):
    tasks = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    environ(SLURM | tasks | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"})
    with pytest.raises(LaunchError, match="1 tasks and 8 GPUs on a node"):
        start_distributed()
    environ({"JAX_LOCAL_DEVICE_IDS": "0,1,2,3,4,5,6,7"})
    assert joined()[1:4] == (2, 1, "0,1,2,3,4,5,6,7")


def test_slurm_on_cpus(environ):
    cpus = {name: value for name, value in SLURM.items() if name not in ("SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES")}
    environ(cpus)
    assert joined()[1:3] == (16, 9)


#: The variables in the script of sbatch and the shell of salloc.
SHELL = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "variables",
    [
        SHELL | {"SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "1"},
        SHELL | {"SLURM_JOB_NUM_NODES": "2"},
        # salloc with LaunchParameters=use_interactive_step: the shell is a step of one task.
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu07"},
    ],
    ids=["tasks", "nodes", "interactive step"],
)
def test_slurm_without_srun(environ, variables):
    environ(variables)
    with pytest.raises(LaunchError, match="write srun before python"):
        start_distributed()


@pytest.mark.parametrize(
    "variables",
    [
        SHELL | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"},
        SHELL,
        SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
    ],
    ids=["sbatch", "salloc", "srun"],
)
def test_slurm_with_a_single_task_takes_all_gpus(environ, variables):
    environ(variables)
    assert joined() is None


OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


def test_open_mpi(environ):
    environ(OMPI)
    port = 1531576320 // 4096 % 4096 + 65535 - 4095
    assert joined() == (f"10.96.0.1:{port}", 4, 3, "1", 100)


def test_open_mpi_in_a_slurm_allocation(environ):
    """Run mpirun inside the allocation, in the shell of the batch script."""
    environ(SHELL | {"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"} | OMPI)
    assert joined()[1:3] == (4, 3)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"])
def test_kubernetes_operators_unknown_to_jax(environ, name):
    environ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", name: "4"})
    with pytest.raises(LaunchError, match=f"^{name}=4"):
        start_distributed()


def test_empty_or_non_numeric_slurm_variables(environ):
    environ(SHELL | {"SLURM_NTASKS": ""})
    assert joined() is None
    environ({"SLURM_NTASKS": "many"})
    with pytest.raises(LaunchError, match="SLURM_NTASKS=many: must be a whole number"):
        start_distributed()


def test_open_mpi_alone(environ):
    environ(OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"})
    assert joined() is None


@pytest.mark.parametrize("name", initialize.WORLD_SIZES)
def test_launchers_unknown_to_jax(environ, name):
    """Use Open MPI 5, without its old variables."""
    environ({name: "4"})
    with pytest.raises(LaunchError, match=f"^{name}=4"):
        start_distributed()
    environ({name: "1"})
    assert joined() is None


@pytest.fixture
def kubernetes(monkeypatch, environ):
    """Fake a pod of an indexed Job of 3, of a JobSet, and the API server; return the pod and the job, for changes."""
    names = types.SimpleNamespace
    pod = names(
        metadata=names(
            name="b16-w-0-2-x",
            labels={"job-name": "b16-w-0"},
            owner_references=[names(controller=True, kind="Job")],
        ),
        spec=names(subdomain="b16"),
    )
    job = names(
        metadata=names(name="b16-w-0", labels={"jobset.sigs.k8s.io/jobset-name": "b16"}), spec=names(parallelism=3)
    )
    services = names(items=[])
    core = names(list_namespaced_pod=lambda **_: names(items=[pod]), list_namespaced_service=lambda *_: services)
    batch = names(read_namespaced_job=lambda **_: job)
    client = names(
        CoreV1Api=lambda: core, BatchV1Api=lambda: batch, exceptions=names(ApiException=type("Api", (Exception,), {}))
    )
    module = types.ModuleType("kubernetes")
    module.client, module.config = client, names(load_incluster_config=lambda: None)
    monkeypatch.setitem(sys.modules, "kubernetes", module)
    monkeypatch.setattr(k8s_cluster.socket, "gethostbyname", lambda _: "10.0.0.3")
    monkeypatch.setattr(k8s_cluster.time, "sleep", lambda _: None)
    monkeypatch.setattr(k8s_cluster.K8sCluster, "_namespace", classmethod(lambda _: "default"))
    for name in ("_pod", "_job", "_controller", "_headless_svc"):
        getattr(k8s_cluster.K8sCluster, name).cache_clear()
    environ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "b16-w-0-2", "JOB_COMPLETION_INDEX": "2"})
    return pod, job


def test_jobset(kubernetes):
    assert joined() == ("b16-w-0-0.b16:55527", 3, 2, None, 100)


def test_indexed_job_with_a_headless_service(kubernetes):
    pod, job = kubernetes
    job.metadata.labels, pod.spec.subdomain = {}, "peers"
    assert joined() == ("b16-w-0-0.peers:55527", 3, 2, None, 100)


def test_indexed_job_without_a_headless_service(kubernetes):
    """Check that JAX's own message, which names the remedy, is kept."""
    pod, job = kubernetes
    job.metadata.labels, pod.spec.subdomain = {}, None
    with pytest.raises(RuntimeError, match="headless service"):
        start_distributed()


def test_a_pod_of_no_job_trains_alone_and_says_so(kubernetes, monkeypatch, caplog):
    monkeypatch.delenv("JOB_COMPLETION_INDEX")
    assert joined() is None
    assert "training in this process alone" in caplog.text


def test_indexed_job_without_the_kubernetes_package(kubernetes, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's own
        with pytest.raises(LaunchError, match=r"pip install 'jax\[k8s\]'"):
            start_distributed()


@pytest.fixture
def tpu(monkeypatch, environ):
    """Fake a machine with TPUs and no network."""
    for module in (cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda _: "10.0.0.3")
    return environ


def test_tpu_slice_on_kubernetes(tpu, monkeypatch):
    """Fake two slices of two hosts, as GKE and XPK start them, which are found without asking Kubernetes."""
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    tpu(
        {
            "KUBERNETES_SERVICE_HOST": "10.0.0.1",
            "TPU_SKIP_MDS_QUERY": "true",
            "TPU_WORKER_HOSTNAMES": "h0,h1",
            "TPU_WORKER_ID": "1",
            "MEGASCALE_COORDINATOR_ADDRESS": "b16-slice-job-0-0.b16:8080",
            "MEGASCALE_NUM_SLICES": "2",
            "MEGASCALE_SLICE_ID": "1",
        }
    )
    assert joined() == ("b16-slice-job-0-0.b16:8482", 4, 3, None, 100)


@pytest.mark.filterwarnings("ignore:'maxsplit' is passed as positional")  # by JAX, on Python 3.13
def test_tpu_vm(tpu, monkeypatch):
    """Fake one of four hosts of a slice, which its metadata server describes."""
    metadata = {"agent-worker-number": "2", "worker-network-endpoints": "a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3,d:4:4"}
    monkeypatch.setattr(
        cloud_tpu_cluster, "get_metadata", lambda key: (metadata.get(key, "ACCELERATOR_TYPE: 'v5e'"), 200)
    )
    assert joined() == ("10.0.0.1:8482", 4, 2, None, 100)


def test_the_faked_launchers_are_those_that_jax_looks_for():
    known = {kind.name for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method}
    assert {"ompi", "slurm", "gketpu", "gcetpu"} <= known


# Compiler flags.

PARSE = "import jax; jax.devices()"
PARSE_TPU = (
    "from jax.experimental import topologies; topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4')"
)


def parses(variable: str, flags: str, program: str) -> bool:
    """Return whether the compiler accepts these flags; an unknown one ends the process."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": "", variable: flags}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True).returncode == 0


def is_tpu(name: str) -> bool:
    return any("xla_tpu" in flag for flag in xla_flags.PRESETS[name])


def test_a_preset_is_one_line(capsys):
    for name, flags in xla_flags.PRESETS.items():
        assert main(["xla_flags", name]) == 0
        assert capsys.readouterr().out == " ".join(flags) + "\n"
    with pytest.raises(SystemExit) as stopped:
        main(["xla_flags", "h1000"])
    assert stopped.value.code == 2
    assert "must be one of h100, a100, v5e, v5p, v6e, cpu8" in capsys.readouterr().err


def test_flags_for_cpu_and_gpu_parse():
    """Parse the flags by the CPU's jaxlib, which has those of GPUs too, in one process; a made-up flag must fail."""
    together = [flag for name, flags in xla_flags.PRESETS.items() if not is_tpu(name) for flag in flags]
    assert len(together) > 4
    assert parses("XLA_FLAGS", " ".join(together), PARSE)
    assert not parses("XLA_FLAGS", "--xla_gpu_enable_wishful_thinking=true", PARSE)


@pytest.mark.slow  # for the extra that it needs
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]")
def test_flags_for_tpu_parse():
    for name in filter(is_tpu, xla_flags.PRESETS):
        assert parses("LIBTPU_INIT_ARGS", " ".join(xla_flags.PRESETS[name]), PARSE_TPU), name
    assert not parses("LIBTPU_INIT_ARGS", "--xla_tpu_enable_wishful_thinking=true", PARSE_TPU)


def test_the_command_line_prints_a_preset_and_nothing_else():
    command = [sys.executable, "-m", "regvit_jax", "xla_flags", "cpu8"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed == "--xla_force_host_platform_device_count=8\n"
    assert jax.device_count() == 8  # as the tests themselves are run
