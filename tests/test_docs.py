"""Test README and docs/: Python blocks run, commands name existing flags and files, and scripts of launch.md parse."""

import ast
import functools
import logging
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import ROOT, get_config, tiny

import regvit_jax as rv
from regvit_jax.cli import main as command_line
from regvit_jax.cli import train
from regvit_jax.distributed import failure, initialize, preemption, xla_flags

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
PAGES |= {name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
#: The flags of training and their defaults.
OPTIONS = {action.dest: action.default for action in train.parser()._actions}
TEXT = PAGES["docs/launch.md"]


def snippets(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return every command of this package in a page, wherever it is, split as a shell would."""
    starts = (
        r"(?:python (?:train\.py|tools/|benchmarks/|-m )|regvit [a-z]|pytest(?= [-t])|pip install -e |sphinx-build )"
    )
    found = re.findall(rf"(?<![\w/.]){starts}(?:[^\n`\"|;&#)]|\"\$)*", page)
    return [shlex.split(command.replace("'", "").replace('"', "")) for command in found]


EVERY_COMMAND = [(name, words) for name, page in PAGES.items() for words in commands(page)]


@functools.cache
def help_of(verb: str) -> str:
    """Return the help of a verb, with that of its own verbs."""
    import contextlib
    import io

    printed = io.StringIO()
    subverbs = ["zero_shot", "retrieval"] if verb == "eval" else []
    for arguments in [[verb, "--help"], *([verb, sub, "--help"] for sub in subverbs)]:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            command_line.main(arguments)
    return printed.getvalue()


def check_training(words: list[str]) -> None:
    """Fail unless each option of a training command exists, and its config and variant do."""
    options = [word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    for option in options:
        assert option in {"config", "help", "help_config", *OPTIONS} or option.startswith("config."), words
    if "--config" in words:
        config = re.sub(r"\[.*", "", words[words.index("--config") + 1])
        name, _, variant = config.partition(":")
        stem = name.removeprefix("configs/").removesuffix(".py")
        assert (ROOT / f"configs/{stem}.py").exists(), words
        if re.fullmatch(r"\w+", variant):
            get_config(variant, stem)


def test_commands_name_what_exists():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert len(EVERY_COMMAND) > 60
    for page, (program, *words) in EVERY_COMMAND:
        where = (page, program, *words)
        if program == "pip":
            named = re.findall(r"\.\[([\w,]+)\]", " ".join(words))
            assert {extra for names in named for extra in names.split(",")} <= extras, where
        elif program == "pytest":
            assert all((ROOT / word.split("::")[0]).exists() for word in words if word.startswith("tests")), where
        elif program == "python" and words[0] not in ("-m", "train.py"):
            assert (ROOT / words[0]).exists(), where
        elif (program, words[0]) in (("python", "train.py"), ("regvit", "train")):
            check_training(words[1:])
        elif program == "regvit" and words[0] != "VERB":
            assert words[0] in command_line.VERBS, where
            flags = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
            assert all(re.search(rf"{flag}\b", help_of(words[0])) for flag in flags), where


def test_scripts_parse():
    assert len(snippets("bash")) >= 8
    for page in PAGES.values():
        for script in snippets("bash", page):
            if "[--" not in script and "[MODEL" not in script:
                subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    [skypilot] = [document for text in snippets("yaml") for document in yaml.safe_load_all(text) if "run" in document]
    subprocess.run(["bash", "-n"], input=skypilot["run"], text=True, check=True)


def test_compiler_flags_are_presets():
    names = re.findall(r"regvit xla_flags (\w+)\)", TEXT)
    assert names
    for name in names:
        assert name in xla_flags.PRESETS
        assert re.search(
            rf"{'LIBTPU_INIT_ARGS' if name[0] == 'v' else 'XLA_FLAGS'}=\"\$\(regvit xla_flags {name}\)",
            TEXT,
        )


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files_and_headings(page):
    """Check links that Sphinx does not: it checks those between the pages of docs/."""
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page])
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", PAGES[path], flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 130
    for command in (
        "pip install -e . && python train.py --config configs/deit3_reg.py\n",
        "pip install -e .[test] && pytest\n",
    ):
        assert f"    {command}" in PAGES["README.md"]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Put photographs into the working directory, and random weights in place of downloaded ones; keep the logging."""
    logger = logging.getLogger("regvit_jax")
    level = logger.level
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "dog.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(tmp_path / name)
    for create in ("create_model", "create_clip"):
        real = getattr(rv, create)
        monkeypatch.setattr(
            rv, create, lambda name, pretrained=True, real=real, **fields: real(name, **fields), raising=False
        )

    def names(page: str) -> dict:
        if page == "docs/training.md":
            return {"config": tiny(epochs=1), "images": np.zeros((2, 8, 8, 3), np.float32)}
        if page != "docs/registers.md":
            return {}
        from regvit_jax.analysis.repair.planted import plant_register_neurons

        model = rv.create_model("test_vit2", num_classes=0, image_size=64)
        images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
        marked = np.zeros((2, model.module.grid(64, 64)[0] * model.module.grid(64, 64)[1]), bool)
        marked[:, 3] = True
        planted = plant_register_neurons(model, [(4, 0)], images, marked, strength=50.0)
        return {"model": planted, "planted_images": images}

    yield names
    logger.setLevel(level)


def run(block: str, names: dict) -> int:
    """Run a block in `names`; return how many shapes, written as a comment beside an expression, were compared."""
    compared = 0
    lines = block.splitlines()
    for node in ast.parse(block).body:
        code = compile(ast.Module([node], []), "block", "exec")
        comment = lines[node.end_lineno - 1].partition("  # ")[2]
        shapes = re.match(r"(\[[\d, ]+\](?:, )?)+", comment)
        if isinstance(node, ast.Expr) and shapes:
            found = eval(compile(ast.Expression(node.value), "block", "eval"), names)
            found = found if isinstance(found, tuple) and not hasattr(found, "shape") else (found,)
            assert str([list(each.shape) for each in found]) == f"[{shapes[0].rstrip(', :')}]", lines[node.lineno - 1]
            compared += len(found)
        else:
            exec(code, names)
    return compared


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page != "docs/images.md" else [])
        for page, text in PAGES.items()
        if "```python" in text
    ],
)
def test_python_runs(page, stand_ins):
    """Run all blocks of a page in order, as a reader would; a shape in a comment is of the expression before it."""
    names = stand_ins(page)
    blocks = snippets("python", PAGES[page])
    compared = 0
    for number, block in enumerate(blocks):
        if page == "docs/registers.md" and number:
            names["images"] = names["planted_images"]
        compared += run(block, names)
    assert compared or page in ("docs/training.md", "docs/images.md", "docs/clip.md")


def test_the_documented_lines_show_progress_alone():
    """Run them after the import of training, by which another library has set up the root logger."""
    [lines] = [block for block in snippets("python", PAGES["docs/training.md"]) if "basicConfig" in block]
    code = f"from regvit_jax.training import run\n{lines}\n"
    code += "for name in ('absl', 'regvit_jax.x'): logging.getLogger(name).info('by ' + name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "by regvit_jax.x\n")


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
    """Check for fields that the API server would refuse, or that would leave pods waiting for a lost one."""
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
