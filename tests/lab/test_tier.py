# SPDX-License-Identifier: Apache-2.0
"""The pkvm tier: marked tests run in the lab and are reported as if they ran here. Without a lab, pytest says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.lab.shares import PACKAGE

CONFTEST = """
from tests.conftest import pytest_configure
"""

CONFIGURATION = """
[pytest]
addopts = --strict-markers -rA
markers =
    kvm: a
    pkvm: b
    lab: c
"""

SAMPLE = """
import time, pytest
from pyvmm.labenv import in_lab

def here():
    return in_lab()

def test_plain_runs_here():
    assert not here()

@pytest.mark.pkvm
class TestThere:
    @pytest.mark.parametrize("n", [1, 2])
    def test_passes(self, n):
        time.sleep(0.3)
        assert here()

    def test_fails_telling_values(self):
        print("said before")
        number = 41
        assert number == 42

    @pytest.mark.skip(reason="not today")
    def test_skips(self):
        raise AssertionError

    @pytest.mark.xfail(reason="known")
    def test_fails_as_known(self):
        raise AssertionError

    @pytest.fixture
    def broken(self):
        raise RuntimeError("no ground")

    def test_breaks_in_setup(self, broken):
        pass

@pytest.fixture(scope="module")
def kept():
    yield 1

def test_here_again_after_them(kept):
    assert not here()

@pytest.mark.pkvm
def test_kills_the_lab():
    open("/proc/sysrq-trigger", "w").write("o" if not here() else "c")

@pytest.mark.pkvm
def test_comes_too_late():
    pass
"""


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text(CONFIGURATION)
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    return tmp_path


def run(directory: Path, *arguments: str, **environment: str) -> str:
    """Run pytest there; give its output."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=directory,
        env={**kept, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.stdout + done.stderr


@pytest.mark.lab
def test_pytest_reports_results_from_the_lab_as_if_they_came_from_here(sample: Path) -> None:
    said = run(sample, "-k", "not late and not kills", "--durations=3", "-vv")
    assert "1 failed, 4 passed, 1 skipped, 2 deselected, 1 xfailed, 1 error" in said
    assert "test_sample.py::TestThere::test_passes[1] PASSED" in said
    assert "assert 41 == 42" in said
    assert "said before" in said
    assert "not today" in said
    assert "RuntimeError: no ground" in said
    assert "s call     test_sample.py::TestThere::test_passes[2]" in said
    assert "pkvm tier: 6 tests ran in the lab" in said


@pytest.mark.lab
def test_a_lab_that_dies_fails_the_remaining_tests_and_shows_its_console(sample: Path) -> None:
    said = run(sample, "-k", "kills or late")
    assert "2 failed" in said
    assert "FAILED test_sample.py::test_comes_too_late - the lab ended while it ran" in said
    assert "sysrq: Trigger a crash" in said


MANY = """
import os, time, pytest

@pytest.mark.pkvm
@pytest.mark.parametrize("n", range(3))
def test_there(n):
    print("boot of", os.path.basename(__file__), open("/proc/sys/kernel/random/boot_id").read())
    time.sleep(4)
    assert n != 1
"""


@pytest.mark.lab
def test_a_second_lab_begins_with_the_last_file_and_pytest_reports_each_result_once(sample: Path) -> None:
    (sample / "test_sample.py").unlink()
    for name in ("a", "b", "c", "d"):
        (sample / f"test_{name}.py").write_text(MANY)
    said = run(sample, "-v")
    assert "4 failed, 8 passed" in said
    told = [line.split()[0] for line in said.splitlines() if line.endswith("%]") and "::" in line]
    assert told == [f"test_{name}.py::test_there[{n}]" for name in "abcd" for n in range(3)]
    boots = {line.split()[2]: line.split()[3] for line in said.splitlines() if line.startswith("boot of ")}
    assert len(boots) == 4
    assert boots["test_a.py"] != boots["test_d.py"]


def without_qemu(directory: Path) -> dict[str, str]:
    """Give an environment whose PATH has no QEMU."""
    programs = directory / "bin"
    programs.mkdir()
    return {"PATH": str(programs)}


def test_pytest_skips_the_tier_in_one_line_without_a_lab(sample: Path) -> None:
    said = run(sample, **without_qemu(sample))
    assert "2 passed, 8 skipped" in said
    assert said.count("qemu-system-aarch64 is not installed") == 2  # once folded by -rA, once in the tier's line
    assert "pkvm tier: 8 tests not run: the lab needs what is not here: QEMU" in said


def test_the_tier_fails_in_ci_without_a_lab(sample: Path) -> None:
    said = run(sample, CI="true", **without_qemu(sample))
    assert "8 failed, 2 passed" in said
    assert "the pkvm tier cannot run, and in CI it must" in said


def test_the_first_failure_ends_the_run_when_asked(sample: Path) -> None:
    said = run(sample, "-x", CI="true", **without_qemu(sample))
    assert "1 failed, 2 passed" in said


def test_pytest_does_not_mention_a_tier_that_nobody_selected(sample: Path) -> None:
    said = run(sample, "-m", "not pkvm", **without_qemu(sample))
    assert "2 passed, 8 deselected" in said
    assert "tier: " not in said
