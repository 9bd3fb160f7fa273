# SPDX-License-Identifier: Apache-2.0
"""linux/kvm.h: structures, requests and flags that are the same on every architecture.

This module has the definitions that every guest's start needs. The capabilities are in ``kvm_cap``, interrupts and
eventfds in ``kvm_irq``, the run area and exit reasons in ``kvm_run``, memory other than plain slots in ``kvm_memory``,
the state of vCPUs and statistics in ``kvm_state``. Architecture-dependent structures and their requests are in
``kvm_arm64``, ``kvm_arm64_vcpu`` and ``kvm_x86``.
"""

from __future__ import annotations

from ctypes import Structure
from enum import IntEnum

from pyvmm.uapi.ioctl import IO, IOW, IOWR
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.uapi.layout import u32, u64

KVM_API_VERSION = 12
KVMIO = 0xAE

# ---- memory ------------------------------------------------------------------------------------------------------

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2

GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1


@layout()
class kvm_userspace_memory_region(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


# ---- devices -----------------------------------------------------------------------------------------------------

KVM_CREATE_DEVICE_TEST = 1


class DeviceType(IntEnum):
    """``enum kvm_device_type``, without those of ppc, s390, riscv and loongarch."""

    KVM_DEV_TYPE_VFIO = 4
    KVM_DEV_TYPE_ARM_VGIC_V2 = 5
    KVM_DEV_TYPE_ARM_VGIC_V3 = 7
    KVM_DEV_TYPE_ARM_VGIC_ITS = 8
    KVM_DEV_TYPE_ARM_PV_TIME = 10
    KVM_DEV_TYPE_ARM_VGIC_V5 = 16


@layout()
class kvm_create_device(Structure):
    type: u32
    fd: u32
    flags: u32


@layout()
class kvm_device_attr(Structure):
    flags: u32
    group: u32
    attr: u64
    addr: u64


# ---- vCPUs -------------------------------------------------------------------------------------------------------

KVM_GUESTDBG_ENABLE = 1 << 0
KVM_GUESTDBG_SINGLESTEP = 1 << 1

KVM_REG_ARCH_MASK = 0xFF00_0000_0000_0000
KVM_REG_X86 = 0x2000_0000_0000_0000
KVM_REG_ARM64 = 0x6000_0000_0000_0000
KVM_REG_SIZE_SHIFT = 52
KVM_REG_SIZE_MASK = 0x00F0_0000_0000_0000
KVM_REG_SIZE_U8 = 0 << KVM_REG_SIZE_SHIFT
KVM_REG_SIZE_U16 = 1 << KVM_REG_SIZE_SHIFT
KVM_REG_SIZE_U32 = 2 << KVM_REG_SIZE_SHIFT
KVM_REG_SIZE_U64 = 3 << KVM_REG_SIZE_SHIFT
KVM_REG_SIZE_U128 = 4 << KVM_REG_SIZE_SHIFT
KVM_REG_SIZE_U256 = 5 << KVM_REG_SIZE_SHIFT
KVM_REG_SIZE_U512 = 6 << KVM_REG_SIZE_SHIFT
KVM_REG_SIZE_U1024 = 7 << KVM_REG_SIZE_SHIFT
KVM_REG_SIZE_U2048 = 8 << KVM_REG_SIZE_SHIFT


def KVM_REG_SIZE(id: int) -> int:
    """Return the bytes of the register with this ONE_REG id."""
    return 1 << ((id & KVM_REG_SIZE_MASK) >> KVM_REG_SIZE_SHIFT)


@layout()
class kvm_one_reg(Structure):
    id: u64
    addr: u64


# ---- machine types -----------------------------------------------------------------------------------------------

KVM_VM_TYPE_ARM_IPA_SIZE_MASK = 0xFF
KVM_VM_TYPE_ARM_PROTECTED = 1 << 31

# ---- requests: /dev/kvm ------------------------------------------------------------------------------------------

KVM_GET_API_VERSION = IO("KVM_GET_API_VERSION", KVMIO, 0x00)
KVM_CREATE_VM = IO("KVM_CREATE_VM", KVMIO, 0x01)
KVM_CHECK_EXTENSION = IO("KVM_CHECK_EXTENSION", KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = IO("KVM_GET_VCPU_MMAP_SIZE", KVMIO, 0x04)

# ---- requests: a VM ----------------------------------------------------------------------------------------------

KVM_CREATE_VCPU = IO("KVM_CREATE_VCPU", KVMIO, 0x41)
KVM_SET_USER_MEMORY_REGION = IOW("KVM_SET_USER_MEMORY_REGION", KVMIO, 0x46, kvm_userspace_memory_region)
KVM_CREATE_DEVICE = IOWR("KVM_CREATE_DEVICE", KVMIO, 0xE0, kvm_create_device)

# ---- requests: a device, a VM or a vCPU --------------------------------------------------------------------------

KVM_SET_DEVICE_ATTR = IOW("KVM_SET_DEVICE_ATTR", KVMIO, 0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR = IOW("KVM_GET_DEVICE_ATTR", KVMIO, 0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR = IOW("KVM_HAS_DEVICE_ATTR", KVMIO, 0xE3, kvm_device_attr)

# ---- requests: a vCPU --------------------------------------------------------------------------------------------

KVM_RUN = IO("KVM_RUN", KVMIO, 0x80)
KVM_GET_ONE_REG = IOW("KVM_GET_ONE_REG", KVMIO, 0xAB, kvm_one_reg)
KVM_SET_ONE_REG = IOW("KVM_SET_ONE_REG", KVMIO, 0xAC, kvm_one_reg)
