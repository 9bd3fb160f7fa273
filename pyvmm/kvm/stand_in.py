# SPDX-License-Identifier: Apache-2.0
"""Replacements for the kernel: one that simulates it, one that records calls, one that lacks capabilities.

The first two make a plan. The last shows pyvmm's behaviour without a capability, on a host that has it. All are
:class:`~pyvmm.kvm.fd.Kernel` s, passed to ``System.open``. Only a recording of the real kernel opens /dev/kvm. A
stand-in's descriptors are memfds, so they can be mapped and closed.
"""

from __future__ import annotations

import errno
import os
from ctypes import memmove

from pyvmm.kvm.fd import KERNEL, Kernel
from pyvmm.kvm.vcpu import ID_AA64MMFR0_EL1
from pyvmm.typed import NamedTuple
from pyvmm.uapi.kvm import KVM_API_VERSION, KVM_CREATE_DEVICE_TEST, DeviceType, kvm_create_device, kvm_one_reg
from pyvmm.uapi.kvm_arm64 import KVM_ARM_TARGET_GENERIC_V8, kvm_vcpu_init
from pyvmm.uapi.kvm_cap import KVM_CAP_ARM_VM_IPA_SIZE, KVM_CAP_NR_MEMSLOTS
from pyvmm.uapi.kvm_memory import kvm_create_guest_memfd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

    from pyvmm.kvm.causes import Value
    from pyvmm.kvm.fd import CData, Fd
    from pyvmm.uapi.ioctl import Ioctl

_RUN_AREA: Final = 0x2000
EVERY_GRANULE: Final = 1 << 20
"""ID_AA64MMFR0_EL1 of a CPU with pages of 4, 16 and 64 KiB."""
_CAPABILITIES: Final = {KVM_CAP_NR_MEMSLOTS: 32767, KVM_CAP_ARM_VM_IPA_SIZE: 40}
"""Capabilities with a number, as in Linux 7.3 on arm64. The others answer 1."""


class Call(NamedTuple):
    """A recorded ioctl: its object (``vcpu0``), and its values. ``result`` is -1 if it failed."""

    name: str
    on: str
    values: Mapping[str, Value]
    result: int


class Recording(Kernel):
    """Passes calls to another kernel, and keeps each in ``calls``, in order."""

    def __init__(self, kernel: Kernel = KERNEL) -> None:
        self.calls: list[Call] = []
        self._kernel = kernel
        self.pretends = kernel.pretends

    def open(self, path: str) -> int:
        """Open the other kernel's device."""
        return self._kernel.open(path)

    def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
        """Pass the call on."""
        # The object's label, without the descriptor's number.
        on = fd.label.partition("=")[0]
        result, errno = self._kernel.ioctl(fd, request, argument, values)
        self.calls.append(Call(request.name, on, dict(values), result))
        return result, errno


class Lacking(Kernel):
    """Passes calls to this host's KVM, but hides ``capabilities`` (KVM_CAP_*)."""

    def __init__(self, *capabilities: int) -> None:
        self._capabilities = capabilities

    def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
        """Pass the call on, unless it checks a hidden capability."""
        if request.name == "KVM_CHECK_EXTENSION" and argument in self._capabilities:
            return 0, 0
        return super().ioctl(fd, request, argument, values)


class StandIn(Kernel):
    """Answers as an arm64 pKVM host without devices ``missing`` would while a machine is made; no guest can run."""

    pretends = True
    missing: tuple[DeviceType, ...] = ()

    def __init__(self, *missing: DeviceType) -> None:
        self.missing = missing

    def open(self, path: str) -> int:
        """Return a memfd as the descriptor."""
        return _descriptor(path.rpartition("/")[2])

    def ioctl(self, fd: Fd, request: Ioctl, argument: int | CData, values: Mapping[str, Value]) -> tuple[int, int]:
        """Report success, and return a descriptor for new objects."""
        del fd, values
        match request.name, argument:
            case "KVM_GET_API_VERSION", _:
                return KVM_API_VERSION, 0
            case "KVM_CHECK_EXTENSION", int():
                return _CAPABILITIES.get(argument, 1), 0
            case "KVM_GET_VCPU_MMAP_SIZE", _:
                return _RUN_AREA, 0
            case "KVM_CREATE_VM", _:
                return _descriptor("vm"), 0
            case "KVM_CREATE_VCPU", _:
                return _descriptor("vcpu", _RUN_AREA), 0
            case "KVM_CREATE_GUEST_MEMFD", kvm_create_guest_memfd():
                return _descriptor("guest_memfd", argument.size), 0
            case "KVM_CREATE_DEVICE", kvm_create_device() if argument.type in self.missing:
                return -1, errno.ENODEV
            case "KVM_CREATE_DEVICE", kvm_create_device() if not argument.flags & KVM_CREATE_DEVICE_TEST:
                argument.fd = _descriptor("device")
            case "KVM_ARM_PREFERRED_TARGET", kvm_vcpu_init():
                argument.target = KVM_ARM_TARGET_GENERIC_V8
            case "KVM_GET_ONE_REG", kvm_one_reg() if argument.id == ID_AA64MMFR0_EL1:
                memmove(argument.addr, EVERY_GRANULE.to_bytes(8, "little"), 8)
        return 0, 0


def _descriptor(name: str, size: int = 0) -> int:
    fd = os.memfd_create(f"pyvmm-plan-{name}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd
