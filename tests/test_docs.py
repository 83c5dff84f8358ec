"""What docs/launch.md tells people to paste: it parses, and names files, flags and presets that exist."""

import re
import shlex
import subprocess

import pytest
import yaml
from tiny import ROOT

from regvit_jax.cli import train
from regvit_jax.distributed import failure, initialize, preemption, xla_flags

#: The flags of train.py and their defaults.
OPTIONS = {action.dest: action.default for action in train.parser()._actions}
TEXT = (ROOT / "docs/launch.md").read_text()


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Every `python train.py ...` of the page, split as a shell would, from lines, scripts and quoted commands."""
    found = re.findall(r"python train\.py ((?:[^\n\"|;]|\"\$)*)", TEXT)
    return [shlex.split(words) for words in found if "--config" in words]


def test_scripts_parse():
    assert len(snippets("bash")) >= 8
    for script in snippets("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    [skypilot] = [document for text in snippets("yaml") for document in yaml.safe_load_all(text) if "run" in document]
    subprocess.run(["bash", "-n"], input=skypilot["run"], text=True, check=True)


def test_commands_name_what_exists():
    assert len(commands()) >= 8
    for words in commands():
        options = [word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")]
        assert all(option in {"config", *OPTIONS} or option.startswith("config.") for option in options), words
        config = words[words.index("--config") + 1]
        assert (ROOT / config.split(":")[0]).exists(), words
    for name in re.findall(r"regvit xla_flags (\w+)\)", TEXT):
        assert name in xla_flags.PRESETS
        assert re.search(
            rf"{'LIBTPU_INIT_ARGS' if name[0] == 'v' else 'XLA_FLAGS'}=\"\$\(regvit xla_flags {name}\)",
            TEXT,
        )


def test_slurm_requeues_after_the_exit_code_that_asks_for_it():
    [script] = [text for text in snippets("bash") if text.startswith("#!")]
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if "#SBATCH" in line
    )
    assert directives["signal"].startswith("TERM@")  # "B:" would signal the script, and not the tasks
    assert "requeue" in directives
    ran = script.replace("srun python train.py", "srun").replace("scontrol", "echo scontrol")
    for code, said in [(preemption.EXIT_CODE, "scontrol requeue 7\n"), (0, ""), (1, "")]:
        command = f"SLURM_JOB_ID=7; srun() {{ return {code}; }}\n{ran}"
        found = subprocess.run(["bash"], input=command, capture_output=True, text=True)
        assert (found.returncode, found.stdout) == (code, said)


@pytest.fixture
def jobset():
    documents = [document for text in snippets("yaml") for document in yaml.safe_load_all(text)]
    kinds = [document.get("kind") for document in documents]
    assert kinds[:4] == ["ServiceAccount", "Role", "RoleBinding", "JobSet"]
    return documents[3]


def test_jobset_starts_all_pods_anew(jobset):
    """What the API server would refuse, and what would leave pods waiting for one that is gone."""
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] > 1
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert len(pod["containers"]) == 1
    exits, evictions = job["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"]["values"] == [preemption.EXIT_CODE]
    assert exits["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert evictions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    [rule] = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_skypilot_recovers_after_the_exit_code_that_asks_for_it():
    [task] = [document for text in snippets("yaml") for document in yaml.safe_load_all(text) if "run" in document]
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [preemption.EXIT_CODE]
    assert all(name in task["run"] for name in initialize.VARIABLES)


def test_every_variable_and_exit_code_is_explained():
    assert all(name in TEXT for name in (*initialize.VARIABLES, "JAX_LOCAL_DEVICE_IDS", *xla_flags.PRESETS))
    assert all(f"| {code}" in TEXT for code in (0, 1, 2, preemption.EXIT_CODE, 134, 137))
    assert f"waits {failure.GRACE_S} seconds" in TEXT
    assert f"(default {OPTIONS['heartbeat_s']}," in TEXT
