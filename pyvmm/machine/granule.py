# SPDX-License-Identifier: Apache-2.0
"""Kernels that cannot run here because of the size of their pages. They would run to their deadline without a word."""

from __future__ import annotations

from pyvmm.errors import HostError, KvmError
from pyvmm.kvm.vcpu import ID_AA64MMFR0_EL1
from pyvmm.pages import GUEST_PAGE, HOST_PAGE
from pyvmm.protection import Protection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.machine.boot import BootImage
    from pyvmm.machine.config import MachineConfig

_FIELDS: Final = {4096: (28, (0, 1)), 16384: (20, (1, 2)), 65536: (24, (0,))}
"""Arm ARM, ID_AA64MMFR0_EL1: the field of each granule's stage 1, and its values that mean that the CPU has it."""


def granules(features: int) -> list[int]:
    """Return the sizes of pages that a CPU has, of its ID_AA64MMFR0_EL1."""
    return [page for page, (shift, has) in _FIELDS.items() if features >> shift & 0xF in has]


def require_granule(image: BootImage, vcpu: Vcpu) -> None:
    """Raise HostError for a kernel whose pages, as its header says them, the vCPU lacks."""
    try:
        there = granules(vcpu.get_reg(ID_AA64MMFR0_EL1))
    except KvmError:  # EL2 may keep a protected guest's registers
        return
    if image.page not in there:
        sizes = " or ".join(_kib(page) for page in there)
        raise HostError(
            f"kernel {image.source} has pages of {_kib(image.page)}, which this CPU lacks",
            hint=f"use a kernel with pages of {sizes}",
        )


def require_resolved_faults(config: MachineConfig) -> None:
    """Raise HostError for a protected Linux on a host on which pKVM does not resolve all of its faults."""
    if config.protection is not Protection.PKVM or HOST_PAGE == GUEST_PAGE:
        return
    from pyvmm.machine import boot, livelock  # of the few hosts with such pages
    from pyvmm.machine.cmdline import is_linux

    image = boot.read(config.kernel, room=config.memory)
    try:
        if is_linux(image):
            raise HostError(
                f"a protected Linux guest does not get far on this host: {livelock.FAULT}",
                hint=f"{livelock.HINT}; --force starts it anyway",
            )
    finally:
        image.close()


def _kib(page: int) -> str:
    return f"{page >> 10} KiB"
