# SPDX-License-Identifier: Apache-2.0
"""What the lab shows tests of guests beside the checkout works there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.guest import initramfs
from pyvmm.guest.kernels import BUSYBOX, IMAGE, INITRAMFS
from pyvmm.labenv import in_lab
from pyvmm.machine import boot
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, run
from tests.pkvm.required import kernel_directory

pytestmark = pytest.mark.pkvm


@pytest.mark.parametrize("name", ["debian:", "own:"])
def test_a_named_kernel_comes_with_its_initramfs(name: str) -> None:
    where = kernel_directory(name)
    image = boot.read(str(where / IMAGE), str(where / INITRAMFS))
    image.close()
    assert image.kind == "Image"
    archive = (where / INITRAMFS).read_bytes()
    base = initramfs.write((where / BUSYBOX).read_bytes())
    assert archive.startswith(base)
    assert (b"virtio_blk.ko" in archive[len(base) :]) == (name == "debian:")


def test_a_command_runs_instead_of_a_shell_and_the_guest_prints_its_status() -> None:
    where = kernel_directory("own:")
    command = "quiet console=ttyAMA0 -- cd /tmp; echo 'a  b' $(pwd); exit 5"
    ended = run(
        str(where / IMAGE),
        Protection.NONE,
        initrd=str(where / INITRAMFS),
        params=(command,),
        memory=128 << 20,
        deadline=300.0,
    )
    assert ended.outcome.ending is Ending.POWEROFF, ended.output
    assert b"a  b /tmp\r\n" in ended.output
    assert initramfs.exit_status(ended.output) == 5


DRIVERS = ["virtio_balloon", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng", "vmw_vsock_virtio_transport"]
ASK = (
    "cd /sys; for each in bus/virtio/drivers/*; do for at in $each/virtio*; do [ -e $at ] && echo $each; done; done; "
    "ls -d kernel/tracing kernel/debug; uname -r"
)


@pytest.mark.parametrize("protection", ALL, ids=lambda each: each.value)
def test_the_projects_kernel_drives_every_device_and_traces_nothing(protection: Protection, tmp_path: Path) -> None:
    subprocess.run(["modprobe", "tun"], check=False)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    options = {
        "--protection": protection.value,
        "--disk": str(tmp_path / "disk"),
        "--net": "tap=pvown0",
        "--vsock": f"uds={tmp_path / 'vsock'},cid=3",
        "--console": f"file={tmp_path / 'console'}",
        "--initrd": str(kernel_directory("own:") / INITRAMFS),
        "--params": f'quiet console=ttyAMA0 pyvmm.run="{ASK}"',
        "--deadline": "600",
        **({"--balloon": "0"} if protection is Protection.NONE else {}),
    }
    words = [word for pair in options.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "run", "--rng", *words, "own:"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.rpartition("/")[2] for line in done.stdout.splitlines() if line.startswith("bus/virtio/drivers/")]
    assert found == [name for name in DRIVERS if name != "virtio_balloon" or protection is Protection.NONE], done.stdout
    assert done.stdout.count("No such file or directory") == 2, done.stdout
    assert "-pyvmm-guest" in done.stdout


@pytest.mark.skipif(not in_lab(), reason="what modules this host has is its own affair")
def test_a_lab_has_taps() -> None:
    subprocess.run(["modprobe", "tun"], check=True, timeout=60)
    assert os.path.exists("/dev/net/tun")
