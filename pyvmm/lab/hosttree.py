# SPDX-License-Identifier: Apache-2.0
"""The device tree of a lab whose KVM has no interrupt controller to give, as on hosts whose own is not Arm's.

QEMU writes the tree that it would give the machine. Without the maintenance interrupt of its GIC, KVM finds no vGIC
(``gic_of_setup_kvm_info()``, irq-gic-v3.c).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pyvmm.errors import HostError
from pyvmm.machine import fdt

_CONTROLLER: Final = "intc@"
_FILE: Final = "tree"
PATIENCE: Final = 120
"""Seconds in which QEMU writes its tree, also on a busy host."""


def dump(program: str, machine: str, arguments: Sequence[str]) -> bytes:
    """Return the tree that QEMU gives a ``machine`` (of -M) with ``arguments``. Raises HostError if it gives none."""
    with tempfile.TemporaryDirectory() as directory:
        machine = f"{machine},dumpdtb={_FILE}"
        try:
            done = subprocess.run(
                [program, "-M", machine, *arguments, "-nodefaults", "-no-user-config", "-display", "none"],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PATIENCE,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise HostError(f"QEMU gives no device tree of its machine: {error}") from error
        try:
            return (Path(directory) / _FILE).read_bytes()
        except OSError:
            said = done.stderr.decode(errors="replace").strip()
            raise HostError(f"QEMU gives no device tree of its machine: {said or done.returncode}") from None


def without_vgic(tree: bytes) -> bytes:
    """Return ``tree`` without its GIC's maintenance interrupt. Raises HostError if it has none.

    QEMU writes a file of 1 MiB, and doubles it when it reads it: Linux takes 2 MiB at most. This one has no padding.
    """
    root = fdt.parse(tree, "QEMU's device tree")
    found = [each for each in root.children if each.name.startswith(_CONTROLLER) and "interrupts" in each.properties]
    if not found:
        raise HostError(f"QEMU's device tree has no {_CONTROLLER}… with a maintenance interrupt")
    for controller in found:
        del controller.properties["interrupts"]
    return fdt.Tree(root).to_bytes()


def into_file(tree: bytes) -> int:
    """Return the descriptor of a file in memory with ``tree``; the caller closes it."""
    fd = os.memfd_create("pyvmm-host-tree", os.MFD_CLOEXEC)
    try:
        os.write(fd, tree)
    except BaseException:
        os.close(fd)
        raise
    return fd
