# SPDX-License-Identifier: Apache-2.0
"""Started from where nobody meant it to be: what is wrong is said in one sentence, and is called no bug of pyvmm's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.experiment import Experiment
from pyvmm.protection import Protection

ROOT = Path(__file__).resolve().parents[2]


def execute(*words: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a directory."""
    return subprocess.run(
        [sys.executable, "-m", "pyvmm", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


# ---- a working directory that has been removed


def removed(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a directory that is gone."""
    gone = directory / "gone"
    gone.mkdir()
    script = (
        f"import os; os.rmdir({str(gone)!r}); import sys; from pyvmm.cli import main; sys.exit(main({list(words)}))"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=gone,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    "line",
    [
        "--lab run payload:hello",
        "--lab --host-kernel ./Image doctor",
        "lab exec true",
        "run --dry-run -d x.img payload:hello",
        "ctl 1 snapshot file",
    ],
)
def test_a_working_directory_that_is_gone_is_named(line: str, tmp_path: Path) -> None:
    done = removed(tmp_path, *line.split())
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            f"pyvmm: the working directory {tmp_path}/gone has been removed",
            "  hint: cd to an existing directory, and try again",
        ],
    )


def test_what_needs_no_working_directory_goes_on_without_one(tmp_path: Path) -> None:
    assert removed(tmp_path, "run", "--dry-run", "payload:hello").returncode == 0


def test_a_file_that_is_missing_elsewhere_is_not_taken_for_it(tmp_path: Path) -> None:
    done = execute("run", "--dry-run", "-d", "x.img", "payload:hello", directory=tmp_path)
    assert done.returncode == 2
    assert "x.img" in done.stderr


# ---- a host of another architecture, from Python


@pytest.mark.skipif(os.uname().machine == "aarch64", reason="about hosts that are not arm64")
@pytest.mark.parametrize("protection", list(Protection))
def test_an_experiment_on_another_architecture_names_the_lab(protection: Protection) -> None:
    with pytest.raises(HostError, match=f"this host is {os.uname().machine}, pyvmm's guests are arm64") as caught:
        Experiment(protection).__enter__()
    hint = caught.value.hint or ""
    assert "pyvmm lab exec -- python3 FILE" in hint
    assert "from Python, subprocess.run(" in hint
