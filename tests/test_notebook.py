"""docs/copo.ipynb: made from docs/notebook/cells.md, and its quick cells run from top to bottom.

Bugs these tests guard against: a notebook edited by hand, which the next edit of its source would
undo; a cell that uses a name, a file or a flag that is no longer there. The cells tagged "slow"
(installation, training) are not run here; their commands are checked against the parsers.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import train

HERE = Path(__file__).resolve().parent.parent
NOTEBOOK = HERE / "docs/copo.ipynb"
EXERCISES = 5  # of those that the notebook has


def sources(slow):
    """The code of the slow or of the quick cells, one text a cell."""
    found = []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        is_slow = "slow" in cell["metadata"].get("tags", ())
        if cell["cell_type"] == "code" and is_slow == slow:
            found.append("".join(cell["source"]))
    return found


def test_the_notebook_is_made_from_its_source(tmp_path):
    for name in ("cells.md", "make.py"):
        (tmp_path / "docs/notebook").mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "docs/notebook" / name, tmp_path / "docs/notebook")
    subprocess.run([sys.executable, tmp_path / "docs/notebook/make.py"], check=True)
    made = (tmp_path / "docs/copo.ipynb").read_text()
    assert made == NOTEBOOK.read_text(), "run python docs/notebook/make.py"
    notebook = nbformat.reads(made, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 15
    assert sources(slow=True) and sources(slow=False)


def test_the_quick_cells_run(tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    copy = tmp_path / "repository"
    copy.mkdir()
    for source in HERE.glob("*.py"):
        shutil.copy(source, copy)
    for name in ("data", "docs", "study"):
        shutil.copytree(HERE / name, copy / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [
        cell for cell in notebook.cells if "slow" not in cell["metadata"].get("tags", ())
    ]
    where = {"metadata": {"path": str(copy / "docs")}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=where).execute()
    printed = ""
    pictures = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            printed += output.get("text", "")
            pictures += "image/png" in output.get("data", {})
    assert "One batch: 9 prompts, 6 responses each" in printed
    assert len(re.findall(r"^ ?\d  0 of \d+ points", printed, flags=re.M)) == EXERCISES
    assert pictures == 1
    assert (copy / "mine/copo.py").exists()


@pytest.mark.parametrize("source", sources(slow=True), ids=lambda source: source[:30])
def test_flags_of_slow_cells_are_known(source):
    flags = (HERE / "docs/small.flags").read_text()
    for line in re.findall(r"!\{PYTHON\} train\.py (.*)", source):
        arguments = shlex.split(line.replace("{FLAGS}", flags).replace("{algo}", "copo"))
        train.build_parser().parse_args(arguments)
