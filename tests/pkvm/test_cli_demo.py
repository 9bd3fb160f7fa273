# SPDX-License-Identifier: Apache-2.0
"""The demo, on a real pKVM host and under the emulated protection."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.pkvm


@pytest.mark.parametrize(("protection", "facts"), [("pkvm", 25), ("emulated", 20)])
def test_every_fact_of_the_demo_is_as_it_should_be(protection: str, facts: int) -> None:
    command = [sys.executable, "-m", "pyvmm", "demo", "--here", "--protection", protection]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert " NO " not in done.stdout, done.stdout
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("Every step was as it should be.\n")
    assert done.stdout.count("\n   ok ") >= facts
    assert done.stderr.startswith("pyvmm: ")
    assert done.stderr.count("\n") == 1
