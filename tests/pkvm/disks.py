# SPDX-License-Identifier: Apache-2.0
"""Disk images for guests: an ext4 file system for a kernel's root, made without privilege."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.pkvm.required import kernel_directory, program

DIRECTORIES = ("bin", "dev", "mnt", "proc", "sys", "tmp")


def make_root(path: Path, size: int, init: str, files: Mapping[str, bytes] | None = None) -> None:
    """Write an ext4 image of ``size`` bytes: busybox, ``init`` as a script of its shell, and ``files``.

    A kernel boots from it with ``root=/dev/vda rw init=/init``. It needs devtmpfs mounted for /dev/console.
    """
    source = path.with_suffix(".d")
    for name in DIRECTORIES:
        (source / name).mkdir(parents=True, exist_ok=True)
    contents = {
        "bin/busybox": (kernel_directory("own:") / "busybox").read_bytes(),
        "init": f"#!/bin/busybox sh\n{init}".encode(),
        **(files or {}),
    }
    for name, data in contents.items():
        file = source / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        file.chmod(0o755)
    with path.open("wb") as image:
        os.truncate(image.fileno(), size)
    options = ["-q", "-F", "-t", "ext4", "-d", str(source)]
    subprocess.run([program("mke2fs", "e2fsprogs"), *options, str(path)], check=True, timeout=300)


def check(path: Path) -> None:
    """Fail if e2fsck finds anything to repair, an unplayed journal included. Does not change the image."""
    command = [program("e2fsck", "e2fsprogs"), "-f", "-n", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recover" not in done.stdout + done.stderr, done.stdout + done.stderr


def read_file(path: Path, name: str) -> bytes:
    """Return a file of the image, without mounting it."""
    command = [program("debugfs", "e2fsprogs"), "-R", f"cat {name}", str(path)]
    return subprocess.run(command, capture_output=True, check=True, timeout=300).stdout
