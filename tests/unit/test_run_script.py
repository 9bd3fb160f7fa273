# SPDX-License-Identifier: Apache-2.0
"""The packages that .run asks for, on a machine with few programs whose user may install nothing."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / ".run"
HERE = ("bash", "dirname", "readlink", "env", "grep", "ls", "sed")
KERNEL = {"make", "bc", "bison", "flex"}


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    """Return a directory for PATH with the programs that .run itself needs. The user may install nothing."""
    for name in HERE:
        where = shutil.which(name)
        assert where is not None, name
        (tmp_path / name).symlink_to(where)
    (tmp_path / "python3").symlink_to(sys.executable)
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    is_a(tmp_path, platform.machine())
    return tmp_path


def is_a(directory: Path, machine: str) -> None:
    """Make ``uname -m`` print this machine."""
    (directory / "uname").write_text(f"#!/bin/sh\necho {machine}\n")
    (directory / "uname").chmod(0o755)


@pytest.mark.parametrize(("machine", "compiles"), [("aarch64", False), ("x86_64", True)])
def test_run_asks_for_the_labs_packages_on_every_machine_without_pkvm(
    lacking: Path, machine: str, compiles: bool
) -> None:
    is_a(lacking, machine)
    command = ["bash", str(RUN), "pyvmm", "demo"]
    done = subprocess.run(command, env={"PATH": str(lacking)}, capture_output=True, text=True, check=False, timeout=60)
    packages = done.stderr.partition("lacks ")[2].partition(";")[0].split()
    assert "qemu-system-arm" in packages
    assert ("gcc-aarch64-linux-gnu" in packages) == compiles


@pytest.mark.parametrize(
    ("command", "ci", "builds"),
    [
        ("pyvmm lab kernel", False, True),
        ("pyvmm lab kernel --refresh", False, True),
        ("pyvmm --lab --host-kernel own doctor", False, True),
        ("pyvmm --lab --lab-host-kernel=own doctor", False, True),
        ("pyvmm lab build --host-kernel stable", False, False),
        ("pyvmm lab status", True, False),
        ("pytest -q", True, True),
        ("pytest -q", False, False),
    ],
)
def test_run_asks_for_the_kernels_build_packages_only_where_it_is_built(
    lacking: Path, command: str, ci: bool, builds: bool
) -> None:
    environment = {"PATH": str(lacking), **({"CI": "1"} if ci else {})}
    done = subprocess.run(
        ["bash", RUN, *command.split()], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1, done.stderr
    [said] = done.stderr.splitlines()
    packages = said.partition("lacks ")[2].partition(";")[0].split()
    assert "gcc" in packages
    assert KERNEL & set(packages) == (KERNEL if builds else set())
    assert said.endswith(f"run: apt-get install -y --no-install-recommends {' '.join(packages)}")
