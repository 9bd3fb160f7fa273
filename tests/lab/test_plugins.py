# SPDX-License-Identifier: Apache-2.0
"""A package installed only on the workstation gives a guest in the lab its device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import plugins
from tests.unit.installed import install

pytestmark = pytest.mark.lab

DEVICE = """
from pyvmm.examples.dice import KIND, DiceDevice
from dice_words import WORD

DiceDevice.compatible = WORD
"""


def test_the_lab_finds_a_packages_device_and_the_packages_it_depends_on(tmp_path: Path) -> None:
    site = tmp_path / "site"
    points = {plugins.DEVICES: {"dice": "lab_dice:KIND"}}
    install(site, "pyvmm-lab-dice", {"lab_dice/__init__.py": DEVICE}, points, requires=["dice-words"])
    install(site, "dice-words", {"dice_words.py": "WORD = 'workstation,dice'"}, {})
    tree = tmp_path / "guest.dtb"
    words = ["run", "--device", "dice,sides=20", "--dump-dtb", str(tree), "payload:hello"]
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "--lab", *words],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "hello" in done.stdout.lower()
    assert b"workstation,dice" in tree.read_bytes()
