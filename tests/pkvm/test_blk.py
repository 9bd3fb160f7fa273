# SPDX-License-Identifier: Apache-2.0
"""Linux with its root file system on a pyvmm disk, in every protection: the disk has all that Linux wrote.

The disk has a queue for each CPU, and gives back the blocks that no file uses.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from pyvmm.devices.kinds.disk import Disk
from pyvmm.machine.plan import Plan
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm import disks
from tests.pkvm.harness import ALL, config, run
from tests.pkvm.required import kernel_directory

pytestmark = pytest.mark.pkvm

DEADLINE = 600.0
WRITTEN, FREE = 64 * MIB, 32 * MIB
PARAMS = ("root=/dev/vda", "rw", "init=/init", "console=ttyAMA0", "quiet", "panic=-1", "audit=0", "mitigations=off")

INIT = f"""
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sysfs /sys
$busybox dd if=/dev/urandom of=/data bs=1M count={WRITTEN // MIB} 2>/dev/null
echo "written $($busybox md5sum </data)"
$busybox sync
echo 3 >/proc/sys/vm/drop_caches
echo "read $($busybox md5sum </data)"
echo "queues: $(echo /sys/block/vda/mq/*)."
$busybox fstrim /
$busybox dmesg | $busybox grep -E 'swiotlb buffer|I/O error'
echo "errors: $($busybox dmesg | $busybox grep -c 'I/O error')."
$busybox mount -o remount,ro /
$busybox poweroff -f
"""

READ = """
busybox=/bin/busybox
$busybox mount -t sysfs sysfs /sys
echo 8192 >/sys/block/vda/queue/read_ahead_kb
echo 4096 >/sys/block/vda/queue/max_sectors_kb
echo "read $($busybox cat /dev/vda | $busybox wc -c)."
$busybox mount -o remount,ro /
$busybox poweroff -f
"""


@pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)
def test_the_disk_has_all_that_linux_wrote_to_its_root_after_power_off(protection: Protection, tmp_path: Path) -> None:
    image = tmp_path / "root.img"
    disks.make_root(image, WRITTEN + FREE, INIT)
    with image.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, WRITTEN + FREE)
    kernel = str(kernel_directory("own:") / "Image")
    # Two CPUs write faster than pyvmm. At times they find the default pool full and wait, and Linux logs that.
    cpus = 2 if protection is Protection.NONE else 1
    ended = run(
        kernel,
        protection,
        cpus=cpus,
        memory=192 * MIB,
        params=PARAMS,
        devices=(Disk(str(image), queues=2),),
        deadline=DEADLINE,
    )
    said = ended.output.decode(errors="replace")
    assert ended.outcome.ending is Ending.POWEROFF, said
    sums = dict(re.findall(r"(written|read) ([0-9a-f]{32})", said))
    assert sums["written"] == sums["read"], said
    disks.check(image)
    data = disks.read_file(image, "/data")
    assert len(data) == WRITTEN
    assert hashlib.md5(data, usedforsecurity=False).hexdigest() == sums["written"], said
    # Linux logs that the pool is full, and waits.
    assert "errors: 0." in said
    assert f"queues: {' '.join(f'/sys/block/vda/mq/{number}' for number in range(cpus))}." in said
    assert WRITTEN < image.stat().st_blocks * 512 < WRITTEN + FREE // 2


def test_a_disk_limits_requests_to_the_pool_of_the_given_device_tree(tmp_path: Path) -> None:
    # Linux would repeat a request that does not fit the pool forever.
    image, tree = tmp_path / "root.img", tmp_path / "a.dtb"
    disks.make_root(image, 16 * MIB, READ)
    kernel = str(kernel_directory("own:") / "Image")
    usual = {"memory": 192 * MIB, "devices": (Disk(str(image)),)}
    with Plan(config(kernel, Protection.PKVM, params=PARAMS, swiotlb=MIB, **usual)) as plan:
        tree.write_bytes(plan.machine.entry.device_tree)
    ended = run(kernel, Protection.PKVM, dtb=str(tree), deadline=DEADLINE, **usual)
    said = ended.output.decode(errors="replace")
    assert ended.outcome.ending is Ending.POWEROFF, said
    assert f"read {16 * MIB}." in said
