# SPDX-License-Identifier: Apache-2.0
"""A host with pages of 16 KiB: what it shares and drops at a time, and the fault that its pKVM never resolves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.lab import Lab, build_image

pytestmark = pytest.mark.lab

PUNCH = """
from pyvmm.errors import UsageError
from pyvmm.experiment import Experiment
from pyvmm.pages import HOST_PAGE

assert HOST_PAGE == 16384
with Experiment(backing="anonymous") as x:
    page = x.page(2)
    x.guest.fill(page, 2 * HOST_PAGE, 7)
    try:
        x.memory.punch(page, 4096)
    except UsageError as error:
        assert "multiples of 0x4000" in error.message
    else:
        raise AssertionError("a part of a page was dropped")
    assert x.guest.sum(page, 2 * HOST_PAGE) == 7 * 2 * HOST_PAGE // 8
    x.memory.punch(page, HOST_PAGE)
    assert x.guest.sum(page, HOST_PAGE) == 0
    assert x.guest.sum(page + HOST_PAGE, HOST_PAGE) == 7 * HOST_PAGE // 8
"""

STUCK = """
from pyvmm.errors import PyvmmError
from pyvmm.experiment import Experiment
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

with Experiment(Protection.PKVM) as x:
    page = x.page(2)
    x.guest.write64(page + HOST_PAGE, 1)
    try:
        x.guest.write64(page + HOST_PAGE - 8, 2)
    except PyvmmError as error:
        assert f"faults on data at gpa {page + 0x3000:#x}" in error.message.replace("_", ""), error.message
    else:
        raise AssertionError("this kernel resolves the fault")
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(image=build_image("backports-16k")) as lab:
        yield lab


@pytest.mark.parametrize("payload", ["echo", "touch"])
@pytest.mark.parametrize("protection", ["none", "emulated", "pkvm"])
def test_payloads_share_the_hosts_pages(lab: Lab, protection: str, payload: str) -> None:
    words = ["run", "--deadline", "60", "--protection", protection, f"payload:{payload}"]
    done = lab.capture(["python3", "-m", "pyvmm", *words])
    assert done.status == 0, done.stderr
    assert b" 0 refused" in done.stderr


def test_a_hole_is_whole_pages_and_nothing_else(lab: Lab) -> None:
    done = lab.capture(["python3", "-c", PUNCH])
    assert (done.status, done.stderr) == (0, b"")


def test_a_guest_that_faults_for_ever_ends_with_its_address(lab: Lab) -> None:
    done = lab.capture(["python3", "-c", STUCK])
    assert done.status == 0, done.stderr
