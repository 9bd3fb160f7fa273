# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm: the host's capabilities, and making VMs."""

from __future__ import annotations

import errno as _errno
import os

from pyvmm.errors import HostError
from pyvmm.kvm.fd import KERNEL, Fd, Kernel
from pyvmm.kvm.vm import Vm
from pyvmm.uapi.kvm import (
    KVM_API_VERSION,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    KVM_GET_API_VERSION,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_VM_TYPE_ARM_PROTECTED,
)
from pyvmm.uapi.kvm_cap import KVM_CAP_ARM_VM_IPA_SIZE, cap_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_LAB = "or use `pyvmm --lab`, which needs no KVM"


class System(Fd):
    """An open /dev/kvm."""

    kind = "kvm"

    @classmethod
    def open(cls, path: str = "/dev/kvm", kernel: Kernel = KERNEL) -> Self:
        """Open KVM. Raises HostError, with a hint, if that fails or ``path`` is not KVM."""
        try:
            fd = kernel.open(path)
        except OSError as error:
            raise _cannot_open(path, error) from error
        system = cls(fd, kernel=kernel)
        version, errno = system.attempt(KVM_GET_API_VERSION)
        if errno or version != KVM_API_VERSION:
            system.close()
            answer = _errno.errorcode.get(errno, str(errno)) if errno else f"API version {version}"
            raise HostError(
                f"{path} is not the KVM that pyvmm knows: it answers {answer} instead of API version {KVM_API_VERSION}",
                hint=f"check it with `ls -l {path}`; KVM is the character device 10, 232",
            )
        return system

    def check(self, cap: int) -> int:
        """Return KVM_CHECK_EXTENSION of a KVM_CAP_*: 0 is no. It is the host's; a VM may have less: Vm.offers."""
        return self.call(KVM_CHECK_EXTENSION, cap, cap=cap_name(cap))

    @property
    def vcpu_mmap_size(self) -> int:
        """Bytes of a vCPU's mapping, kvm_run first."""
        return self.call(KVM_GET_VCPU_MMAP_SIZE)

    @property
    def max_ipa_bits(self) -> int:
        """The maximum address bits in an arm64 VM's type; 0 if they cannot be chosen."""
        return self.check(KVM_CAP_ARM_VM_IPA_SIZE)

    def create_vm(self, type: int = 0) -> Vm:
        """Make a VM. ``machine_type`` combines its kind (KVM_VM_TYPE_ARM_PROTECTED or 0) and its address bits.

        0 bits mean 40. A pKVM host always uses all its bits (kvm_init_stage2_mmu).
        """
        return Vm(self.call(KVM_CREATE_VM, type, type=type), self)

    def supports_protected(self) -> bool:
        """Whether this host runs protected VMs. Tests it by making one, which taints such a kernel (TAINT_USER)."""
        fd, errno = self.attempt(KVM_CREATE_VM, KVM_VM_TYPE_ARM_PROTECTED)
        if errno == _errno.EINVAL:
            return False
        if errno:
            raise self.error(KVM_CREATE_VM.name, errno, type=KVM_VM_TYPE_ARM_PROTECTED)
        os.close(fd)
        return True


def _cannot_open(path: str, error: OSError) -> HostError:
    if error.errno in (_errno.ENOENT, _errno.ENXIO, _errno.ENODEV):
        return HostError(
            f"this host has no KVM ({path}: {error.strerror})",
            hint="load KVM (x86: `modprobe kvm_intel` or `kvm_amd`; arm64: boot at EL2, and `dmesg | grep kvm`), "
            f"{_LAB}",
        )
    if error.errno in (_errno.EACCES, _errno.EPERM):
        return HostError(
            f"this user may not open {path} ({error.strerror})",
            hint=f"join its group (`sudo usermod -aG kvm $USER`, then log in again) or be root, {_LAB}",
        )
    return HostError(f"cannot open {path}: {error.strerror}", hint=f"see `ls -l {path}`, {_LAB}")
