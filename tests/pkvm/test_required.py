# SPDX-License-Identifier: Apache-2.0
"""What tests of guests are shown beside the checkout works where they run."""

from __future__ import annotations

import os
import subprocess

import pytest

from pyvmm.guest import initramfs
from pyvmm.guest.kernels import BUSYBOX, IMAGE, INITRAMFS
from pyvmm.labenv import in_lab
from pyvmm.machine import boot
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import run
from tests.pkvm.required import kernel_directory

pytestmark = pytest.mark.pkvm


@pytest.mark.parametrize("name", ["debian:", "own:"])
def test_a_kernel_comes_with_an_initramfs_of_its_own(name: str) -> None:
    where = kernel_directory(name)
    image = boot.read(str(where / IMAGE), str(where / INITRAMFS))
    image.close()
    assert image.kind == "Image"
    archive = (where / INITRAMFS).read_bytes()
    base = initramfs.write((where / BUSYBOX).read_bytes())
    assert archive.startswith(base)
    assert (b"virtio_blk.ko" in archive[len(base) :]) == (name == "debian:")


def test_a_command_runs_instead_of_a_shell_and_its_status_is_told_before_the_guest_is_off() -> None:
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


@pytest.mark.skipif(not in_lab(), reason="what modules this host has is its own affair")
def test_a_lab_has_taps() -> None:
    subprocess.run(["modprobe", "tun"], check=True, timeout=60)
    assert os.path.exists("/dev/net/tun")
