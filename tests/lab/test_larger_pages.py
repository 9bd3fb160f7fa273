# SPDX-License-Identifier: Apache-2.0
"""A host with pages of 16 KiB: what it shares and drops at a time, and the fault that its pKVM never resolves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.lab import Lab, build_image
from pyvmm.lab.peers import Prepared, prepare
from tests.nightly import NIGHTLY

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
import sys

from pyvmm.errors import PyvmmError
from pyvmm.experiment import Experiment
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

with Experiment(Protection(sys.argv[1]), sys.argv[2]) as x:
    page = x.page(2)
    x.guest.write64(page + HOST_PAGE, 1)
    try:
        x.guest.write64(page + HOST_PAGE - 8, 2)
    except PyvmmError as error:
        assert f"faults on data at gpa {page + 0x3000:#x}" in error.message.replace("_", ""), error.message
    else:
        raise AssertionError("this kernel resolves the fault")
"""


DISK = b"sixteen!" * 8192


@pytest.fixture(scope="module")
def shown() -> Prepared:
    return prepare(["debian:", "shell:"])


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk.img"
    path.write_bytes(DISK)
    return path


@pytest.fixture(scope="module")
def lab(shown: Prepared, disk: Path) -> Iterator[Lab]:
    image = build_image("backports-16k")
    with Lab(image=image, arguments=[*shown.paths, str(disk), str(image.kernel)]) as lab:
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


@pytest.mark.parametrize(("protection", "backing"), [("pkvm", "memfd"), ("none", "guest_memfd")])
def test_a_guest_that_faults_for_ever_ends_with_its_address(lab: Lab, protection: str, backing: str) -> None:
    done = lab.capture(["python3", "-c", STUCK, protection, backing])
    assert done.status == 0, done.stderr


if NIGHTLY:

    @pytest.mark.parametrize("page", [4, 16])
    @pytest.mark.parametrize("protection", ["none", "emulated"])
    def test_linux_boots_with_pages_of_either_size(
        lab: Lab, shown: Prepared, disk: Path, protection: str, page: int
    ) -> None:
        kernel = "debian:" if page == 4 else str(build_image("backports-16k").kernel)
        # Debian's kernel shares no memory with the host, so under emulated it has no virtio devices. The modules in
        # shell: are those of the kernel with pages of 4 KiB.
        device, read = (["-d", f"{disk},ro"], "head -c 8 /dev/vda") if (protection, page) == ("none", 4) else ([], "")
        command = f"grep -m1 KernelPageSize /proc/self/smaps; {read}"
        words = f"console=ttyAMA0 loglevel=1 audit=0 lsm= mitigations=off panic=-1 -- {command}"
        # Debian's kernel with pages of 16 KiB panics in less ("bio: can't create integrity buf pool").
        options = [
            "-m",
            "768",
            "--deadline",
            "400",
            "--protection",
            protection,
            *device,
            "-i",
            "shell:",
            "-p",
            words,
            kernel,
        ]
        done = lab.capture(["python3", "-P", "-m", "pyvmm", "run", *options], env=shown.environment, timeout=500)
        said = done.stdout.decode()
        assert done.status == 0, said + done.stderr.decode()
        assert f"KernelPageSize: {page:>8} kB" in said
        assert ("sixteen!" in said) is bool(device)
