# SPDX-License-Identifier: Apache-2.0
"""The lab under kernels other than its default, modules loaded on demand, and files that verbs write from the lab."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyvmm.errors import PyvmmError
from pyvmm.lab import Lab, build_image
from pyvmm.lab.cache import Image
from pyvmm.lab.kernels import DEFAULT, KernelFile
from pyvmm.lab.shares import PACKAGE

pytestmark = pytest.mark.lab

OTHER = "stable"

USE_ZRAM = """
set -e
modprobe zram
echo 64M > /sys/block/zram0/disksize
python3 -I -S - <<'END'
import mmap, os
disk = os.open("/dev/zram0", os.O_RDWR | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
page[:] = b"direct" + bytes(4090)
os.pwrite(disk, page, 8192)
page[:] = bytes(4096)
os.preadv(disk, [page], 8192)
assert page[:6] == b"direct"
END
mkswap /dev/zram0 >/dev/null
swapon /dev/zram0
python3 -I -S - <<'END'
import mmap
memory = mmap.mmap(-1, 8 << 20)
memory[:] = bytes(range(256)) * (32 << 10)
memory.madvise(21)  # MADV_PAGEOUT
used = int(open("/proc/swaps").read().split()[-2])
assert used > 4096, used
assert memory[:] == bytes(range(256)) * (32 << 10)
END
swapoff /dev/zram0
"""


@pytest.fixture(scope="module", params=[DEFAULT, OTHER])
def image(request: pytest.FixtureRequest) -> Image:
    return build_image(request.param)


@pytest.fixture(scope="module")
def lab(image: Image) -> Iterator[Lab]:
    with Lab(image=image, bare=True) as lab:
        yield lab


def test_the_lab_runs_the_given_kernel_as_a_pkvm_host(lab: Lab, image: Image) -> None:
    assert lab.capture(["uname", "-r"]).stdout.decode().strip() == image.manifest.release
    assert re.search(rb"Protected [nh]VHE mode initialized successfully", lab.capture(["dmesg"]).stdout)


def test_the_lab_loads_only_9p_and_can_load_zram(lab: Lab) -> None:
    loaded = lab.capture(["cat", "/proc/modules"]).stdout.decode()
    assert {line.split()[0] for line in loaded.splitlines()} == {"9p", "9pnet", "9pnet_virtio", "netfs"}
    done = lab.capture(["sh", "-c", USE_ZRAM])
    assert (done.status, done.stderr) == (0, b"")


def test_the_error_for_a_kernel_without_modules_says_it_needs_9p_built_in(tmp_path: Path) -> None:
    other = build_image(OTHER)
    foreign = replace(build_image(), file=KernelFile(other.kernel, other.release))
    with (
        pytest.raises(PyvmmError, match=r"cannot be made visible in the lab: .*No such device") as caught,
        Lab(image=foreign, cwd=tmp_path),
    ):
        pass
    assert f"{other.kernel} ({other.release}) finds none of its modules" in (caught.value.hint or "")


def test_files_that_a_verb_writes_outlive_the_lab(tmp_path: Path) -> None:
    (tmp_path / "a, b=c").mkdir()
    tree = tmp_path / "a, b=c" / "guest=1.dtb"
    with tempfile.NamedTemporaryFile(dir="/tmp", prefix="pyvmm test, ") as console:
        run = ["--lab", "run", "--dump-dtb", str(tree), "--serial", f"file={console.name}", "payload:hello"]
        done = subprocess.run(
            [sys.executable, "-m", "pyvmm", *run], cwd=PACKAGE.parent, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert b"hello from a plain guest" in Path(console.name).read_bytes()
    assert tree.read_bytes().startswith(b"\xd0\x0d\xfe\xed")
