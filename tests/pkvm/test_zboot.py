# SPDX-License-Identifier: Apache-2.0
"""A kernel as Fedora ships it, an EFI zboot image of zstd, boots."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.kernel_files import zboot
from tests.pkvm.harness import run
from tests.pkvm.required import kernel_directory

pytestmark = pytest.mark.pkvm

PARAMS = ("console=ttyAMA0", "quiet", "panic=-1", "audit=0", "mitigations=off", "-- date +%s")


def test_an_efi_zboot_image_of_zstd_boots(tmp_path: Path) -> None:
    import zstandard  # only the lab must have it

    files = kernel_directory("own:")
    plain = (files / "Image").read_bytes()
    packed = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(plain)
    kernel = tmp_path / "vmlinuz.efi"
    kernel.write_bytes(zboot(b"zstd", packed + struct.pack("<I", len(plain)), len(packed)))
    assert len(packed) < len(plain) // 2
    ended = run(
        str(kernel),
        Protection.NONE,
        initrd=str(files / "shell.cpio"),
        memory=64 << 20,
        params=PARAMS,
        deadline=600.0,
    )
    assert ended.outcome.ending is Ending.POWEROFF, ended
    assert b"pyvmm: exit status 0" in ended.output
