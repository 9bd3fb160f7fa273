# SPDX-License-Identifier: Apache-2.0
"""How a guest is booted under QEMU with KVM, the same for every comparison with it. Owns nothing."""

from __future__ import annotations

from collections.abc import Sequence


def command(
    program: Sequence[str], kernel: str, parameters: str, *options: str, cpus: int = 1, memory: int
) -> list[str]:
    """Return the command that boots ``kernel`` with ``memory`` MiB, and with no device that is not asked for."""
    return [
        *program,
        *("-M", "virt,gic-version=host", "-accel", "kvm", "-cpu", "host"),
        *("-smp", str(cpus), "-m", str(memory)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-kernel", kernel, "-append", parameters),
        *options,
    ]
