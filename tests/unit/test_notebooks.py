# SPDX-License-Identifier: Apache-2.0
"""The notebooks of pyvmm/examples are committed as nbformat 4 JSON without outputs."""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from pyvmm.atlas.claim import all_claims
from tests import notebooks

each_notebook = pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.name)


def test_there_is_a_notebook() -> None:
    assert "lab.ipynb" in [path.name for path in notebooks.NOTEBOOKS]


@each_notebook
def test_notebook_is_of_format_4_5(path: Path) -> None:
    notebook = notebooks.load(path)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    for cell in notebook["cells"]:
        more = {"code": {"outputs", "execution_count"}, "markdown": set[str]()}[cell["cell_type"]]
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | more
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cell["id"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")


@each_notebook
def test_notebook_has_no_outputs(path: Path) -> None:
    for cell in notebooks.load(path)["cells"]:
        assert (cell.get("outputs", []), cell.get("execution_count")) == ([], None)


@each_notebook
def test_notebook_is_written_as_jupyter_writes_it(path: Path) -> None:
    # Jupyter sorts keys and indents by one. A user who saves the file unchanged sees no difference in git.
    assert path.read_text() == json.dumps(notebooks.load(path), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@each_notebook
def test_names_that_a_notebook_imports_are_there(path: Path) -> None:
    imported = 0
    for name, source in notebooks.code_cells(notebooks.load(path)):
        for node in ast.walk(ast.parse(source, name)):
            if isinstance(node, ast.ImportFrom):
                missing = [each.name for each in node.names if not hasattr(import_module(str(node.module)), each.name)]
                assert missing == []
                imported += 1
    assert imported


@each_notebook
def test_notebook_tells_the_number_of_claims(path: Path) -> None:
    told = re.findall(r"(\d+) claims", path.read_text())
    assert told == [str(len(all_claims()))] * len(told)


def test_value_of_a_cell_is_its_last_expression() -> None:
    cells = [
        {"cell_type": "code", "id": "a", "source": ["x = 1\n", "x + 1"]},
        {"cell_type": "markdown", "id": "b", "source": ["1 / 0"]},
        {"cell_type": "code", "id": "c", "source": ["y = x"]},
    ]
    assert list(notebooks.run({"cells": cells}, {})) == [("a", 2), ("c", None)]
