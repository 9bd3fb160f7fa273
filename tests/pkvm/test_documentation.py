# SPDX-License-Identifier: Apache-2.0
"""Every Python example of the documents runs on a pKVM host, and prints the output in its document."""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, Block, blocks

pytestmark = pytest.mark.pkvm


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.name)
def test_example_runs_and_prints_the_documented_output(block: Block, tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(block.text)
    done = subprocess.run(
        [sys.executable, example],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if block.output is not None:
        checker = doctest.OutputChecker()
        assert checker.check_output(block.output, done.stdout, doctest.ELLIPSIS), done.stdout
