# SPDX-License-Identifier: Apache-2.0
"""Packages with plug-ins are copied for the lab: their files and their dependencies, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pyvmm import plugins
from pyvmm.errors import UsageError
from pyvmm.lab.staging import stage
from tests.unit.installed import ARM64, X86, install

DICE = {plugins.DEVICES: {"dice": "dice.device:faces"}}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    return directory


def staged(directory: Path, *packages: str) -> list[str]:
    """Copy packages, and return the copied files, except their metadata."""
    stage([metadata.distribution(name) for name in packages], directory)
    found = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return sorted(str(path) for path in found if not path.parts[0].endswith(".dist-info"))


def find_by(path: Path) -> str:
    """Return what a fresh interpreter finds that imports from ``path`` and pyvmm."""
    code = "from pyvmm import plugins; print(plugins.find(plugins.DEVICES, 'dice', int))"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path += [{str(path)!r}]; {code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_copied_package_is_found_by_its_entry_points(site: Path, tmp_path: Path) -> None:
    modules = {"dice/__init__.py": "", "dice/device.py": "import sides\nfaces = sides.x", "sides.py": "x = 6"}
    install(site, "pyvmm-dice", modules, DICE)
    install(site, "stranger", {"stranger.py": ""}, {})
    (site / "dice" / "__pycache__").mkdir()
    (site / "dice" / "__pycache__" / "device.pyc").write_bytes(b"")
    assert staged(tmp_path / "copy", "pyvmm-dice") == ["dice/__init__.py", "dice/device.py", "sides.py"]
    assert find_by(tmp_path / "copy") == "6\n"


def test_dependencies_are_copied_except_those_that_the_lab_has(site: Path, tmp_path: Path) -> None:
    requires = ["Num_Bers>=1", "cffi", "not-installed", "typing-extras; extra == 'test'"]
    install(site, "pyvmm-dice", {"dice/device.py": "import numbers_lib\nfaces = 6"}, DICE, requires=requires)
    install(site, "num-bers", {"numbers_lib.py": ""}, {}, requires=["deeper", "pyvmm-dice"])
    install(site, "deeper", {"deeper/__init__.py": ""}, {})
    install(site, "typing-extras", {"extras.py": ""}, {})
    assert staged(tmp_path / "copy", "pyvmm-dice") == ["deeper/__init__.py", "dice/device.py", "numbers_lib.py"]


def test_an_editable_install_is_copied_from_its_source(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src"
    (source / "dice").mkdir(parents=True)
    (source / "dice" / "device.py").write_text("faces = 20")
    (source / "unrelated.py").write_text("")
    install(site, "pyvmm-dice", {"_pyvmm_dice.pth": str(source)}, DICE)
    monkeypatch.syspath_prepend(source)  # as site does for a .pth
    assert staged(tmp_path / "copy", "pyvmm-dice") == ["dice/device.py"]
    assert find_by(tmp_path / "copy") == "20\n"


def test_an_editable_install_of_one_module_is_copied(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "one_die.py").write_text("faces = 8")
    install(site, "pyvmm-dice", {"_pyvmm_dice.pth": "x"}, {plugins.DEVICES: {"dice": "one_die:faces"}})
    monkeypatch.syspath_prepend(tmp_path / "src")
    assert staged(tmp_path / "copy", "pyvmm-dice") == ["one_die.py"]


def test_code_compiled_for_the_lab_is_copied_and_code_for_other_machines_refused(site: Path, tmp_path: Path) -> None:
    install(site, "pyvmm-dice", {"dice/device.py": ""}, DICE, {"dice/arm.so": ARM64})
    assert staged(tmp_path / "good", "pyvmm-dice") == ["dice/arm.so", "dice/device.py"]
    install(site, "pyvmm-fast", {"fast.py": ""}, {}, {"_fast.abi3.so": X86})
    with pytest.raises(
        UsageError, match=r"the package pyvmm-fast cannot be .*/_fast\.abi3\.so is compiled for another"
    ):
        staged(tmp_path / "bad", "pyvmm-dice", "pyvmm-fast")


def test_a_package_that_refers_to_pyvmm_itself_gets_only_its_entry_points_copied(site: Path, tmp_path: Path) -> None:
    install(site, "pyvmm-dice", {}, {plugins.DEVICES: {"dice": "pyvmm.examples.dice:KIND"}})
    assert staged(tmp_path / "copy", "pyvmm-dice") == []
    assert (tmp_path / "copy" / "pyvmm_dice-1.0.dist-info" / "entry_points.txt").is_file()


def test_a_package_without_files_is_refused_by_name(site: Path, tmp_path: Path) -> None:
    install(site, "pyvmm-dice", {}, DICE)
    with pytest.raises(UsageError, match="the package pyvmm-dice cannot be shown to the lab: it has no files"):
        staged(tmp_path / "copy", "pyvmm-dice")
