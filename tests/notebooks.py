# SPDX-License-Identifier: Apache-2.0
"""The notebooks of pyvmm/examples, run by plain Python: their code cells in order, without Jupyter."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.documents import ROOT

NOTEBOOKS = sorted((ROOT / "pyvmm" / "examples").glob("*.ipynb"))


def load(path: Path) -> dict[str, Any]:
    """Return a notebook's JSON."""
    notebook: dict[str, Any] = json.loads(path.read_text())
    return notebook


def code_cells(notebook: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (id, source) of every code cell."""
    return [(cell["id"], "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any], names: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Run every code cell with ``names`` as its globals. Yield its id and its last expression's value, or None."""
    for name, source in code_cells(notebook):
        tree = ast.parse(source, name)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
        yield name, value
