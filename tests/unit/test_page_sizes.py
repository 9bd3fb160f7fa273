# SPDX-License-Identifier: Apache-2.0
"""Pages of 16 and 64 KiB: pyvmm counts in the host's, whatever their size. The host is faked in another process."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm._native import lib
from pyvmm.pages import GUEST_PAGE, HOST_PAGE, HOST_PAGE_SHIFT, HUGE_SIZE

ROOT = Path(__file__).resolve().parents[2]

COUNTING = ("balloon_pages", "machine_lazy", "memory", "memory_conversion", "memory_on_demand", "source_server")
"""Modules of unit tests that must hold with pages of any size. They are run once more with larger ones."""


def test_the_hosts_page_is_asked_from_the_system() -> None:
    assert HOST_PAGE == 1 << HOST_PAGE_SHIFT == 1 << lib.pv_page_shift == mmap.PAGESIZE == os.sysconf("SC_PAGE_SIZE")
    assert HOST_PAGE % GUEST_PAGE == 0


@pytest.mark.parametrize("page", [16384, 65536])
def test_tests_of_memory_hold_on_a_host_with_larger_pages(page: int) -> None:
    files = [f"tests/unit/test_{name}.py" for name in COUNTING]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.faked_pages", *files]
    environment = os.environ | {"PYVMM_TEST_PAGE": str(page)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


@pytest.mark.parametrize(("page", "huge"), [(4096, 2 << 20), (16384, 32 << 20), (65536, 512 << 20)])
def test_a_huge_page_is_what_a_table_of_pages_maps(page: int, huge: int) -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import tests.faked_pages; from pyvmm.pages import HUGE_SIZE; print(HUGE_SIZE)"],
        cwd=ROOT,
        env=os.environ | {"PYVMM_TEST_PAGE": str(page)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(said.stdout) == huge
    assert HUGE_SIZE == HOST_PAGE * HOST_PAGE // 8
