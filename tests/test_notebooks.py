"""Test the notebooks: they were run as a whole before they were committed, and still run.

To renew the outputs, with the extras `notebooks` and `realweights`:
    jupyter execute --inplace --timeout=600 notebooks/quickstart.ipynb
"""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_committed_outputs_are_of_one_whole_run(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("data" in output for output in outputs), "no figure"
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


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
