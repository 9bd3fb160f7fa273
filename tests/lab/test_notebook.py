# SPDX-License-Identifier: Apache-2.0
"""The notebook of pyvmm/examples runs on a workstation with a lab, and shows what it says."""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pyvmm.atlas.model import Result
from pyvmm.experiment import Verdict
from pyvmm.memory.ledger import PageState
from pyvmm.observe.pagemap import PageMap
from tests import notebooks
from tests.documents import ROOT

pytestmark = pytest.mark.lab

NOTEBOOK = ROOT / "pyvmm/examples/lab.ipynb"


def test_notebook_runs_an_experiment_in_a_lab_and_shows_its_page_map(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, values = {}, {}
    try:
        for name, value in notebooks.run(notebooks.load(NOTEBOOK), names):
            printed[name], values[name] = capsys.readouterr().out, value
    finally:
        with contextlib.suppress(KeyError):  # the first cell failed
            names["stack"].close()

    assert printed["start-code"].startswith("Linux ")
    assert "aarch64" in printed["start-code"]
    assert printed["experiment-code"] == "the host reads None from a private page and 42 from the shared one\n"
    page_map = values["map-code"]
    assert isinstance(page_map, PageMap)
    assert page_map.counts()[PageState.SHARED] == (1, 0)
    assert page_map.counts()[PageState.PRIVATE].pages > 15
    assert page_map.counts()[PageState.HOST].pages > 1000
    assert ET.fromstring(page_map._repr_svg_().encode()).tag.endswith("svg")

    result = values["claim-code"]
    assert isinstance(result, Result)
    assert (result.protection, result.verdict) == ("pkvm", Verdict.HOLDS)
    assert "<svg" in result._repr_html_()
    assert not Path(names["directory"]).exists()
