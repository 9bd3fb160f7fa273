# SPDX-License-Identifier: Apache-2.0
"""The demo of an installed wheel, on a workstation without a compiler and without the checkout."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from native import build
from pyvmm.lab import build_image
from tests.wheel import Installation, copy_source, wheel_of

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed"),
    pytest.mark.skipif(build.compiler("aarch64") is None, reason="no C compiler for aarch64"),
]


def test_the_demo_of_a_wheel_runs_without_a_compiler(tmp_path: Path) -> None:
    build_image()
    there = Installation.of(wheel_of(copy_source(tmp_path), tmp_path), tmp_path)
    demo = there.run("pyvmm", "demo")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "   NO  " not in demo.stdout
    assert demo.stdout.endswith("Every step was as it should be.\n")
