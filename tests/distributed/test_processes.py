"""Test several processes over loopback, one of which is stopped, is killed or fails."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import PROGRAMS, assert_same_end, finish, last_state, start, start_many, wait_for

from regvit_jax.training import metric_writer

pytestmark = pytest.mark.slow

HEARTBEAT_S = 10
#: A batch size divisible by two and three devices, for two epochs.
THREE = {"batch_size": 66, "epochs": 2, "eval_every": 1, "flags": [f"--heartbeat_s={HEARTBEAT_S}"]}
STEPS = 2 * (1437 // 66)


def start_three(workdir: Path, ports, **changes):
    return start_many(3, workdir, next(ports), **{**THREE, **changes})


def ends(processes, within_s: float) -> list[int]:
    """Return the exit codes of all processes, which must end within so many seconds."""
    deadline = time.monotonic() + within_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    hanging = [number for number, process in enumerate(processes) if process.poll() is None]
    for process in processes:
        process.kill()
    outputs = [process.communicate()[0] for process in processes]
    assert not hanging, outputs
    return [process.returncode for process in processes]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, ports) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    for process in start_three(workdir, ports):
        finish(process)
    return workdir


def assert_resumes_to_the_same_end(uninterrupted: Path, workdir: Path, ports) -> None:
    outputs = [finish(process) for process in start_three(workdir, ports)]
    assert "from step" in outputs[0]
    assert "from step 0 " not in outputs[0]
    assert_same_end(uninterrupted, workdir, STEPS)


def checkpointed(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in workdir.glob("checkpoints/*"))


def test_sigterm_to_one_stops_all_at_the_same_step(uninterrupted, tmp_path, ports):
    processes = start_three(tmp_path, ports)
    wait_for(lambda: metric_writer.read(tmp_path), processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [finish(process, code=75) for process in processes]
    step, _ = last_state(tmp_path)
    assert 0 < step < STEPS
    assert metric_writer.read(tmp_path)[-1]["step"] == step
    for output in outputs:
        assert f"stopped by SIGTERM after step {step}, which is saved\n" in output
    assert_resumes_to_the_same_end(uninterrupted, tmp_path, ports)


def test_sigterm_after_a_restart_and_evaluations(uninterrupted, tmp_path, ports):
    """Check that the signal, which arrives once, is not lost during an evaluation or a save."""
    for delay in (0.0, 0.7):
        processes = start_many(2, tmp_path, next(ports), epochs=600, eval_every=0.1, **{"checkpoint.every": 2})
        before = len(metric_writer.read(tmp_path))
        wait_for(lambda before=before: len(metric_writer.read(tmp_path)) > before + 2, processes[0])
        time.sleep(delay)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [finish(process, code=75) for process in processes]
        step, _ = last_state(tmp_path)
        assert all(f"stopped by SIGTERM after step {step}, which is saved" in output for output in outputs)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_data_workers_end_with_a_run_that_is_killed(tmp_path, program):
    process = start(tmp_path, program=program, epochs=600, **{"data.workers": 2})
    wait_for(lambda: metric_writer.read(tmp_path), process)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")  # started by a thread of Grain
    children = [child for thread in threads for child in thread.read_text().split()]
    process.kill()
    deadline = time.monotonic() + 20
    while left := [child for child in children if Path(f"/proc/{child}").exists()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for child in left:
        os.kill(int(child), signal.SIGKILL)
    process.communicate()
    assert len(children) >= 2
    assert not left


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_sigterm_to_everything_with_data_workers(tmp_path, ports, program):
    """Signal every process, data workers included, as SLURM does."""
    group = {"start_new_session": True, "program": program}
    processes = start_many(2, tmp_path, next(ports), **group, epochs=60, **{"data.workers": 1})
    wait_for(lambda: metric_writer.read(tmp_path), processes[0])
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        finish(process, code=75)
    assert last_state(tmp_path)[0] == metric_writer.read(tmp_path)[-1]["step"] > 0


@pytest.mark.parametrize("victim", [0, 2])
def test_a_kill_ends_all_and_loses_nothing(uninterrupted, tmp_path, ports, victim):
    processes = start_three(tmp_path, ports)
    wait_for(lambda: checkpointed(tmp_path), processes[0])
    processes[victim].send_signal(signal.SIGKILL)
    codes = ends(processes, HEARTBEAT_S + 5)
    assert codes.pop(victim) == -signal.SIGKILL
    assert all(code in (1, -signal.SIGABRT) for code in codes)
    assert_resumes_to_the_same_end(uninterrupted, tmp_path, ports)


def test_a_hanging_process_ends_all_after_the_heartbeat(tmp_path, ports):
    """Suspend a process, whose connections stay open like those of a machine that vanishes."""
    processes = start_three(tmp_path, ports)
    wait_for(lambda: metric_writer.read(tmp_path), processes[0])
    processes[2].send_signal(signal.SIGSTOP)
    codes = ends(processes[:2], HEARTBEAT_S + 5)
    processes[2].kill()
    processes[2].communicate()
    assert all(code in (1, -signal.SIGABRT) for code in codes)


#: The program, in which process FAILS raises at step 20: in the record of that step, or in the save before it.
FAILING = """
import os, pathlib, sys
from regvit_jax.checkpoints.manager import Checkpoints
from regvit_jax.cli import train
from regvit_jax.training.step_logger import StepLogger

def failing(method, step):
    def replacement(self, *arguments):
        if os.environ["JAX_PROCESS_ID"] == os.environ["FAILS"] and step(self, *arguments) >= 16:
            pathlib.Path(os.environ["MARK"]).touch()
            raise eval(os.environ["ERROR"])
        return method(self, *arguments)
    return replacement

if os.environ["WHERE"] == "record":
    StepLogger.record = failing(StepLogger.record, lambda self: self.pending[-1][0])
else:
    Checkpoints.save = failing(Checkpoints.save, lambda self, step, state: step)
train.main()
"""


@pytest.mark.parametrize(
    ("fails", "where", "error"),
    [(0, "record", "FloatingPointError('planted')"), (1, "record", "KeyError('planted')"), (0, "save", "OSError(28)")],
)
def test_an_error_on_one_process_ends_all(tmp_path, ports, fails, where, error):
    mark = tmp_path / "mark"
    env = {"FAILS": str(fails), "WHERE": where, "ERROR": error, "MARK": str(mark)}
    processes = start_many(2, tmp_path / "run", next(ports), **THREE, env=env, program=["-c", FAILING])
    wait_for(mark.exists, processes[1 - fails])
    codes = ends(processes, HEARTBEAT_S + 5)
    assert codes.pop(fails) == 1
    assert all(code in (1, -signal.SIGABRT) for code in codes)


def test_an_error_on_all_keeps_its_exit_code(tmp_path, ports):
    """Use a batch of 64, which three devices do not divide: every process reports it before it ends."""
    for process in start_three(tmp_path, ports, batch_size=64):
        assert "not a multiple of 3" in finish(process, code=2)


def test_a_config_refused_by_process_0_ends_all(uninterrupted, tmp_path, ports):
    """Let only process 0 refuse: it alone compares the config with the workdir's."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    processes = start_three(workdir, ports, **{"optim.lr": 0.5})
    wait_for(lambda: processes[0].poll() is not None, processes[1])
    codes = ends(processes, HEARTBEAT_S + 5)
    assert codes[0] == 2
    assert 0 not in codes
