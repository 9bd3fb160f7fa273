# SPDX-License-Identifier: Apache-2.0
"""Explain why KVM refused a call: map errno and arguments to a cause and a next step.

Callers of KVM raise :func:`kvm_error`. If an errno has several reasons, the arguments select one. Without a match, the
message is errno's text.
"""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Callable, Mapping
from enum import IntEnum

from pyvmm.errors import KvmError, hex_
from pyvmm.typed import NamedTuple
from pyvmm.uapi.errno import EHWPOISON
from pyvmm.uapi.kvm import GUEST_MEMFD_FLAG_MMAP, KVM_MEM_GUEST_MEMFD, KVM_VM_TYPE_ARM_PROTECTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

Value: TypeAlias = int | str | None
Values: TypeAlias = Mapping[str, Value]

_HOST_PAGE = os.sysconf("SC_PAGE_SIZE")
_HEX = {
    "address",
    "attr",
    "base",
    "control",
    "datamatch",
    "flags",
    "gpa",
    "hva",
    "id",
    "memfd_flags",
    "mode",
    "offset",
    "size",
    "type",
    "value",
}


def _int(values: Values, name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else 0


def _unaligned(*names: str) -> Callable[[Values], object]:
    return lambda values: any(_int(values, name) % _HOST_PAGE for name in names)


def _protected(values: Values) -> bool:
    return bool(_int(values, "type") & KVM_VM_TYPE_ARM_PROTECTED)


def _any(_values: Values) -> object:
    return True


class Cause(NamedTuple):
    """The cause of ``errno`` from one of ``calls`` ("*": any), if ``when`` accepts the arguments, and a hint."""

    calls: str
    errno: int
    text: str
    hint: str | None = None
    when: Callable[[Values], object] = _any


_SLOT = "KVM_SET_USER_MEMORY_REGION KVM_SET_USER_MEMORY_REGION2"
_GMEM = "KVM_CREATE_GUEST_MEMFD"
_ATTR = "KVM_SET_DEVICE_ATTR KVM_GET_DEVICE_ATTR"
_REG = "KVM_GET_ONE_REG KVM_SET_ONE_REG"

# The first match is used. Sources are functions of Linux 7.3's virt/kvm and arch/arm64/kvm, or of the named file.
CAUSES = (
    # kvm_arch_init_vm, pkvm_init_host_vm
    Cause(
        "KVM_CREATE_VM", _errno.EINVAL,
        "this host cannot make protected VMs: it does not run pKVM, or its kernel is too old",
        "boot an arm64 kernel that has them (7.3 does) with kvm-arm.mode=protected, use `pyvmm --lab`, or ask for "
        "--protection emulated",
        _protected,
    ),
    Cause(
        "KVM_CREATE_VM", _errno.EINVAL, "the kernel does not support this machine type, or this number of address bits",
        "type 0 is a plain VM; KVM_CAP_ARM_VM_IPA_SIZE gives the maximum bits",
    ),
    Cause(
        "KVM_CREATE_VM", _errno.ENOMEM, "no memory for another VM, or a pKVM host that already has its 255 VMs",
        "end other VMs on this host",
    ),
    # kvm_vm_ioctl_create_vcpu, kvm_arch_vcpu_precreate
    Cause("KVM_CREATE_VCPU", _errno.EEXIST, "the VM already has a vCPU of this number"),
    Cause(
        "KVM_CREATE_VCPU", _errno.EINVAL, "the number is too large for this kernel, or the VM has its maximum of vCPUs",
        "KVM_CAP_MAX_VCPU_ID and KVM_CAP_MAX_VCPUS give the limits",
    ),
    Cause(
        "KVM_CREATE_VCPU", _errno.EBUSY, "the interrupt controller is already initialised",
        "create every vCPU before KVM_DEV_ARM_VGIC_CTRL_INIT",
    ),
    # kvm_set_memory_region, kvm_gmem_bind, kvm_arch_prepare_memory_region
    Cause(_SLOT, _errno.EEXIST, "the range overlaps another slot", "delete that slot first, or choose another gpa"),
    Cause(
        _SLOT, _errno.EINVAL, f"gpa, size, hva and offset must be multiples of {_HOST_PAGE} bytes", None,
        _unaligned("gpa", "size", "hva", "offset"),
    ),
    Cause(_SLOT, _errno.EINVAL, "there is no such slot to delete", None, lambda v: not _int(v, "size")),
    Cause(
        _SLOT, _errno.EINVAL, "arm64 accepts only a guest_memfd that was made with GUEST_MEMFD_FLAG_MMAP",
        "pass GUEST_MEMFD_FLAG_MMAP; without INIT_SHARED the host may map but not access it",
        lambda v: "memfd_flags" in v and not _int(v, "memfd_flags") & GUEST_MEMFD_FLAG_MMAP,
    ),
    Cause(
        _SLOT, _errno.EINVAL,
        "guest_memfd slots can only be deleted, not changed, accept neither READONLY nor LOG_DIRTY_PAGES, and lie in "
        "a part of a guest_memfd of this VM that no other slot uses",
        None, lambda v: _int(v, "flags") & KVM_MEM_GUEST_MEMFD,
    ),
    Cause(
        _SLOT, _errno.EINVAL, "no such slot number, an existing slot that cannot change like this, or a bad hva",
        "KVM_CAP_NR_MEMSLOTS gives the limit; delete a slot before reusing its number",
    ),
    Cause(
        _SLOT, _errno.EPERM,
        "a protected VM accepts no read-only or dirty-logged slots, and keeps its slots once it has run",
        "only add slots; to remove memory, end the VM",
    ),
    Cause(_SLOT, _errno.EFAULT, "the range ends beyond the VM's address bits", "see System.max_ipa_bits"),
    Cause(_SLOT, _errno.EBADF, "the guest_memfd is closed, or not a guest_memfd"),
    Cause(_SLOT, _errno.ENOTTY, "this kernel is older than 6.8, the first with guest_memfd and this call"),
    # kvm_gmem_create
    Cause(_GMEM, _errno.EINVAL, f"the size must be a multiple of {_HOST_PAGE} bytes, and not 0", None,
          lambda v: _int(v, "size") % _HOST_PAGE or not _int(v, "size")),
    Cause(_GMEM, _errno.EINVAL, "the kernel does not know these flags, or has no guest_memfd",
          "see KVM_CAP_GUEST_MEMFD and KVM_CAP_GUEST_MEMFD_FLAGS"),
    Cause(_GMEM, _errno.ENOTTY, "this kernel has no guest_memfd", "use a memfd; arm64 has it since Linux 6.18"),
    # kvm_ioctl_create_device, vgic-init.c, vgic-its.c
    Cause("KVM_CREATE_DEVICE", _errno.ENODEV, "this kernel makes no device of this type", "try another type"),
    Cause("KVM_CREATE_DEVICE", _errno.EEXIST, "the VM already has one"),
    Cause("KVM_CREATE_DEVICE", _errno.EBUSY, "a vCPU has already run", "create devices before the first run"),
    # kvm_device_ioctl_attr, vgic-kvm-device.c, kvm_smccc_set_filter, kvm_pkvm_ioctl_allowed
    Cause(
        _ATTR, _errno.EINVAL, "a protected VM has no SMCCC filter; in a plain one the range is empty or too long",
        "EL2 answers a protected VM's shares; use --protection emulated to forward them",
        lambda v: v.get("attr") == "KVM_ARM_VM_SMCCC_FILTER",
    ),
    Cause(_ATTR, _errno.ENXIO, "there is no such attribute here"),
    Cause(_ATTR, _errno.EBUSY, "too late: it is already set or initialised, or a vCPU has run"),
    Cause(_ATTR, _errno.EEXIST, "it is already set, or overlaps another range"),
    Cause(_ATTR, _errno.E2BIG, "the address is beyond the VM's address bits"),
    Cause(_ATTR, _errno.ENODEV, "the attribute's object is missing or not ready"),
    # eventfd.c
    Cause("KVM_IOEVENTFD", _errno.EEXIST, "another eventfd is already registered for the same stores"),
    Cause("KVM_IOEVENTFD", _errno.ENOENT, "no such eventfd is registered there"),
    Cause("KVM_IRQFD", _errno.EBUSY, "the eventfd already drives this or another interrupt"),
    Cause("KVM_IRQFD", _errno.EAGAIN, "the interrupt controller is not initialised yet"),
    Cause("KVM_IRQFD", _errno.EINVAL, "not an eventfd, an unknown interrupt, or no interrupt controller in the kernel"),
    Cause("KVM_IOEVENTFD KVM_IRQFD", _errno.EBADF, "the eventfd is closed"),
    Cause("KVM_IRQ_LINE", _errno.ENXIO, "the VM has no interrupt controller in the kernel"),
    Cause("KVM_SIGNAL_MSI", _errno.EINVAL, "the VM has no interrupt controller in the kernel"),
    # kvm_get_dirty_log_protect
    Cause("KVM_GET_DIRTY_LOG", _errno.ENOENT, "the slot is missing or has no KVM_MEM_LOG_DIRTY_PAGES"),
    Cause("KVM_GET_DIRTY_LOG", _errno.EINVAL, "no such slot number"),
    # kvm_vcpu_set_target, kvm_arm_vcpu_ioctl
    Cause(
        "KVM_ARM_VCPU_INIT", _errno.ENOENT, "this kernel does not know this feature",
        "see KVM_ARM_VCPU_* in pyvmm.uapi",
    ),
    Cause(
        "KVM_ARM_VCPU_INIT", _errno.EINVAL, "this host or VM type lacks a requested feature, or the vCPU was "
        "initialised with other features before",
        "a protected vCPU has PSCI_0_2 and pointer authentication, no SVE and no PMU",
    ),
    Cause(_REG, _errno.ENOENT, "this vCPU has no such register"),
    Cause(_REG, _errno.ENOEXEC, "the vCPU is not initialised", "call Vcpu.init() first"),
    Cause(
        _REG, _errno.EPERM, "the register is not accessible before KVM_ARM_VCPU_FINALIZE, or never from user space; or "
        "EL2 keeps it, which the registers of a protected guest that has run are on kernels after 7.3",
    ),
    # Documentation/virt/kvm/arm/pkvm.rst of Linux 7.4
    Cause(
        "KVM_ARM_VCPU_INIT", _errno.EPERM, "EL2 keeps a protected vCPU that has run as it is", "make a new VM instead",
    ),
    Cause("KVM_SET_VCPU_EVENTS", _errno.EPERM, "EL2 injects no external abort into a protected guest for the host"),
    Cause("KVM_SET_GUEST_DEBUG", _errno.EPERM, "EL2 lets nobody debug a protected guest"),
    Cause(
        "KVM_SET_MP_STATE", _errno.EPERM, "the guest has switched this vCPU off, and only the guest can switch it on",
    ),
    Cause("KVM_GET_REG_LIST KVM_GET_VCPU_EVENTS KVM_SET_VCPU_EVENTS", _errno.ENOEXEC, "the vCPU is not initialised"),
    # kvm_arch_vcpu_ioctl_run, pkvm_mem_abort, gmem_abort
    Cause(
        "KVM_RUN", _errno.ENOMEM, "no memory, or the limit of locked pages is reached (RLIMIT_MEMLOCK)",
        "raise `ulimit -l` above the guest's memory, or run with CAP_IPC_LOCK; the vCPU can then run on",
    ),
    Cause("KVM_RUN", _errno.EFAULT, "the guest accessed a page that its backing lacks, or that was reclaimed"),
    Cause("KVM_RUN", EHWPOISON, "a page of the guest lies in broken memory"),
    Cause("KVM_RUN", _errno.ENOEXEC, "the vCPU is not initialised", "call Vcpu.init() first"),
    Cause("KVM_RUN", _errno.EBUSY, "the interrupt controller is not initialised", "set KVM_DEV_ARM_VGIC_CTRL_INIT"),
    Cause("KVM_RUN", _errno.ENOSYS, "the guest accessed an address without memory by an instruction that KVM cannot "
          "decode", "devices support plain loads and stores: no pairs, no write-back"),
    Cause("KVM_RUN", _errno.EIO, "memory that a protected guest cannot have (hugetlb, guest_memfd, a file), a VM that "
          "died, or one made by another process"),
    # any call
    Cause("*", _errno.EBADF, "it is closed"),
    Cause("*", _errno.EIO, "the VM died of an earlier error, or another process made it",
          "use a VM only in the process that made it: threads, not forks"),
    Cause("*", _errno.ENOTTY, "this kernel does not know the call, or not on this object",
          "it may be too old, or of another architecture; see `pyvmm doctor`"),
    Cause("*", _errno.EMFILE, "this process has no file descriptor left", "raise `ulimit -n`"),
)  # fmt: skip


def explain(call: str, errno: int, values: Values) -> tuple[str | None, str | None]:
    """Return the cause and the hint of a failed call, each None if unknown."""
    for cause in CAUSES:
        if cause.errno == errno and (cause.calls == "*" or call in cause.calls.split()) and cause.when(values):
            return cause.text, cause.hint
    return None, None


def kvm_error(call: str, errno: int, values: Values) -> KvmError:
    """Return the error for a call that failed with ``errno``. The value under "" is plain text."""
    arguments = ", ".join(filter(None, (argument_text(name, value) for name, value in values.items())))
    return KvmError(call, arguments, errno, *explain(call, errno, values))


def argument_text(name: str, value: Value) -> str:
    """Format an argument as ``name=value``; empty for None."""
    if value is None:
        return ""
    if not name:
        return str(value)
    if isinstance(value, IntEnum):
        return f"{name}={value.name}"
    return f"{name}={hex_(value) if isinstance(value, int) and name in _HEX and value >= 0 else value}"
