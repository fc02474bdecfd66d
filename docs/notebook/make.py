"""Write docs/copo.ipynb from docs/notebook/cells.md: `python docs/notebook/make.py`.

Text becomes a Markdown cell and a Python block a code cell, without outputs. A block that begins
with ```python slow gets the tag "slow": the tests do not run it. Change cells.md, never the
notebook.
"""

import json
import re
from pathlib import Path

SOURCE = Path(__file__).resolve().with_name("cells.md")
NOTEBOOK = SOURCE.parents[1] / "copo.ipynb"
BLOCK = re.compile(r"^```python( slow)?\n(.*?)^```\n", flags=re.S | re.M)


def make_cell(kind, number, source):
    lines = source.strip("\n").splitlines(keepends=True)
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}


def make_cells(text):
    """Markdown with Python blocks -> the cells, in order."""
    cells = []
    # The pieces come in threes: text, " slow" or None, and the block behind them.
    pieces = [*BLOCK.split(text), None, None]
    for prose, slow, code in zip(pieces[::3], pieces[1::3], pieces[2::3]):
        if prose.strip():
            cells.append(make_cell("markdown", len(cells), prose))
        if code is not None:
            cell = make_cell("code", len(cells), code)
            cell.update(execution_count=None, outputs=[])
            if slow:
                cell["metadata"]["tags"] = ["slow"]
            cells.append(cell)
    return cells


def make_notebook(text):
    """The text of the notebook file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": make_cells(text),
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(make_notebook(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{NOTEBOOK}: {len(make_cells(SOURCE.read_text(encoding='utf-8')))} cells")
