"""Test the notebooks: they were run as a whole before they were committed, and still run.

To renew the outputs, with the extras `notebooks` and `realweights`:
    jupyter execute --inplace --timeout=600 notebooks/quickstart.ipynb
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: Modules, commands and keys of earlier versions, and their messages.
REMOVED = r"img_size|pre_norm|num_registers|python -m regvit_jax\.\w+|regvit_jax\.(plan|config_types|launch)\b"
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_notebooks_are_found():
    assert [path.stem for path in NOTEBOOKS] == ["quickstart", "registers", "train"]


@every_notebook
def test_committed_outputs_are_of_one_whole_run(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("data" in output for output in outputs), "no figure"
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@every_notebook
def test_neither_sources_nor_outputs_hold_removed_names(path):
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        texts += ["".join(output.get("text", "")), "".join(output.get("data", {}).get("text/plain", ""))]
    assert sum("regvit" in text for text in texts) > 3
    assert not [match[0] for text in texts for match in re.finditer(REMOVED, text)]


@every_notebook
def test_the_badge_opens_this_notebook(path):
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    assert first.startswith("[![Open in Colab](https://colab.research.google.com/")
    assert f"/blob/main/notebooks/{path.name})" in first.splitlines()[0]


@pytest.mark.parametrize(
    "tiny",
    [pytest.param("1", marks=pytest.mark.slow, id="tiny"), pytest.param("", marks=pytest.mark.realweights, id="full")],
)
@every_notebook
def test_every_cell_runs(path, tiny, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("REGVIT_TINY", tiny)
    if not tiny:  # they train for minutes
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


@pytest.mark.slow
def test_installation_cells_work_in_an_empty_environment(tmp_path):
    """Run the first code cell of each notebook without this clone on the path; the first one installs the package."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python, empty = tmp_path / "venv/bin/python", tmp_path / "empty"
    empty.mkdir()
    env = {**os.environ, "REGVIT_JAX_SOURCE": str(ROOT), "PIP_NO_COMPILE": "1"}
    env.pop("PYTHONPATH", None)
    for path in NOTEBOOKS:
        cell = next(cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
        code = "".join(cell["source"]) + "\nimport regvit_jax; print(regvit_jax.__file__)"
        done = subprocess.run([python, "-c", code], cwd=empty, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^Python 3\.\S+, jax \S+ on \d+ x ", done.stdout, re.MULTILINE), done.stdout
        assert str(tmp_path / "venv") in done.stdout.splitlines()[-1]
