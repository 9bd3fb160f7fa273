"""What tests of guests are shown beside the checkout works where they run."""

from __future__ import annotations

import os
import subprocess

import pytest

from pyvmm.guest import initramfs
from pyvmm.guest.kernels import BUSYBOX, IMAGE, INITRAMFS
from pyvmm.machine import boot
from pyvmm.shown import in_lab
from tests.pkvm.shown import kernel_directory, program

pytestmark = pytest.mark.pkvm


@pytest.mark.parametrize(("name", "package", "option"), [
    ("passt", "passt", "--version"), ("gdb-multiarch", "gdb-multiarch", "--version"), ("mke2fs", "e2fsprogs", "-V"),
    ("e2fsck", "e2fsprogs", "-V"), ("debugfs", "e2fsprogs", "-V"),
])  # fmt: skip
def test_a_program_of_debians_runs(name: str, package: str, option: str) -> None:
    subprocess.run([program(name, package), option], capture_output=True, check=True, timeout=300)


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


@pytest.mark.skipif(not in_lab(), reason="what modules this host has is its own affair")
def test_a_lab_has_taps() -> None:
    subprocess.run(["modprobe", "tun"], check=True, timeout=60)
    assert os.path.exists("/dev/net/tun")
