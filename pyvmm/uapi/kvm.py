# SPDX-License-Identifier: Apache-2.0
"""linux/kvm.h: structures, requests and flags that are the same on every architecture.

The capabilities are in ``kvm_cap``, interrupts and eventfds in ``kvm_irq``, the run area and exit reasons in
``kvm_run``; what depends on the architecture, requests with such a structure too, in ``kvm_arm64`` and ``kvm_x86``.
"""

from __future__ import annotations

from ctypes import Structure, Union
from enum import IntEnum

from pyvmm.uapi.ioctl import IO, IOR, IOW, IOWR
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint8, c_uint64

    from pyvmm.uapi.layout import pointer, s16, u16, u32, u64

KVM_API_VERSION = 12
KVMIO = 0xAE

# ---- memory ------------------------------------------------------------------------------------------------------

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2

GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1

KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1
KVM_DIRTY_GFN_F_MASK = 0x3


@layout()
class kvm_userspace_memory_region(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@layout(pad2=14)
class kvm_userspace_memory_region2(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    guest_memfd_offset: u64
    guest_memfd: u32
    pad1: u32
    pad2: Array[c_uint64]


@layout(reserved=6)
class kvm_create_guest_memfd(Structure):
    size: u64
    flags: u64
    reserved: Array[c_uint64]


@layout()
class kvm_memory_attributes(Structure):
    address: u64
    size: u64
    attributes: u64
    flags: u64


@layout(padding=5)
class kvm_pre_fault_memory(Structure):
    gpa: u64
    size: u64
    flags: u64
    padding: Array[c_uint64]


@layout()
class _bitmap(Union):
    dirty_bitmap: pointer
    padding2: u64


@layout()
class kvm_dirty_log(Structure):
    _anonymous_ = ("_bitmap",)
    slot: u32
    padding1: u32
    _bitmap: _bitmap


@layout()
class kvm_clear_dirty_log(Structure):
    _anonymous_ = ("_bitmap",)
    slot: u32
    num_pages: u32
    first_page: u64
    _bitmap: _bitmap


@layout()
class kvm_dirty_gfn(Structure):
    flags: u32
    slot: u32
    offset: u64


@layout()
class _pad_or_pio(Union):
    pad: u32
    pio: u32


@layout()
class kvm_coalesced_mmio_zone(Structure):
    _anonymous_ = ("_pio",)
    addr: u64
    size: u32
    _pio: _pad_or_pio


@layout(data=8)
class kvm_coalesced_mmio(Structure):
    _anonymous_ = ("_pio",)
    phys_addr: u64
    len: u32
    _pio: _pad_or_pio
    data: Array[c_uint8]


@layout()
class kvm_coalesced_mmio_ring(Structure):
    """Followed by the kvm_coalesced_mmio entries."""

    first: u32
    last: u32


# ---- devices -----------------------------------------------------------------------------------------------------

KVM_CREATE_DEVICE_TEST = 1


class DeviceType(IntEnum):
    """``enum kvm_device_type``."""

    KVM_DEV_TYPE_FSL_MPIC_20 = 1
    KVM_DEV_TYPE_FSL_MPIC_42 = 2
    KVM_DEV_TYPE_XICS = 3
    KVM_DEV_TYPE_VFIO = 4
    KVM_DEV_TYPE_ARM_VGIC_V2 = 5
    KVM_DEV_TYPE_FLIC = 6
    KVM_DEV_TYPE_ARM_VGIC_V3 = 7
    KVM_DEV_TYPE_ARM_VGIC_ITS = 8
    KVM_DEV_TYPE_XIVE = 9
    KVM_DEV_TYPE_ARM_PV_TIME = 10
    KVM_DEV_TYPE_RISCV_AIA = 11
    KVM_DEV_TYPE_LOONGARCH_IPI = 12
    KVM_DEV_TYPE_LOONGARCH_EIOINTC = 13
    KVM_DEV_TYPE_LOONGARCH_PCHPIC = 14
    KVM_DEV_TYPE_LOONGARCH_DMSINTC = 15
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


class MpState(IntEnum):
    """``kvm_mp_state.mp_state``; arm64 knows RUNNABLE, STOPPED and SUSPENDED."""

    KVM_MP_STATE_RUNNABLE = 0
    KVM_MP_STATE_UNINITIALIZED = 1
    KVM_MP_STATE_INIT_RECEIVED = 2
    KVM_MP_STATE_HALTED = 3
    KVM_MP_STATE_SIPI_RECEIVED = 4
    KVM_MP_STATE_STOPPED = 5
    KVM_MP_STATE_CHECK_STOP = 6
    KVM_MP_STATE_OPERATING = 7
    KVM_MP_STATE_LOAD = 8
    KVM_MP_STATE_AP_RESET_HOLD = 9
    KVM_MP_STATE_SUSPENDED = 10


@layout()
class kvm_one_reg(Structure):
    id: u64
    addr: u64


@layout()
class kvm_reg_list(Structure):
    """Followed by ``n`` ids of 64 bits."""

    n: u64


@layout()
class kvm_mp_state(Structure):
    mp_state: u32


@layout()
class kvm_signal_mask(Structure):
    """Followed by ``len`` bytes of signal set."""

    len: u32


@layout(args=4, pad=64)
class kvm_enable_cap(Structure):
    cap: u32
    flags: u32
    args: Array[c_uint64]
    pad: Array[c_uint8]


# ---- statistics --------------------------------------------------------------------------------------------------

KVM_STATS_TYPE_SHIFT = 0
KVM_STATS_TYPE_MASK = 0xF << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_CUMULATIVE = 0 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_INSTANT = 1 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_PEAK = 2 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_LINEAR_HIST = 3 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_LOG_HIST = 4 << KVM_STATS_TYPE_SHIFT


@layout()
class kvm_stats_header(Structure):
    flags: u32
    name_size: u32
    num_desc: u32
    id_offset: u32
    desc_offset: u32
    data_offset: u32


@layout()
class kvm_stats_desc(Structure):
    """Followed by ``kvm_stats_header.name_size`` bytes of name."""

    flags: u32
    exponent: s16
    size: u16
    offset: u32
    bucket_size: u32


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
KVM_GET_DIRTY_LOG = IOW("KVM_GET_DIRTY_LOG", KVMIO, 0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = IOW("KVM_SET_USER_MEMORY_REGION", KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_USER_MEMORY_REGION2 = IOW("KVM_SET_USER_MEMORY_REGION2", KVMIO, 0x49, kvm_userspace_memory_region2)
KVM_REGISTER_COALESCED_MMIO = IOW("KVM_REGISTER_COALESCED_MMIO", KVMIO, 0x67, kvm_coalesced_mmio_zone)
KVM_UNREGISTER_COALESCED_MMIO = IOW("KVM_UNREGISTER_COALESCED_MMIO", KVMIO, 0x68, kvm_coalesced_mmio_zone)
KVM_CLEAR_DIRTY_LOG = IOWR("KVM_CLEAR_DIRTY_LOG", KVMIO, 0xC0, kvm_clear_dirty_log)
KVM_RESET_DIRTY_RINGS = IO("KVM_RESET_DIRTY_RINGS", KVMIO, 0xC7)
KVM_GET_STATS_FD = IO("KVM_GET_STATS_FD", KVMIO, 0xCE)
KVM_SET_MEMORY_ATTRIBUTES = IOW("KVM_SET_MEMORY_ATTRIBUTES", KVMIO, 0xD2, kvm_memory_attributes)
KVM_CREATE_GUEST_MEMFD = IOWR("KVM_CREATE_GUEST_MEMFD", KVMIO, 0xD4, kvm_create_guest_memfd)
KVM_CREATE_DEVICE = IOWR("KVM_CREATE_DEVICE", KVMIO, 0xE0, kvm_create_device)

# ---- requests: a device, a VM or a vCPU --------------------------------------------------------------------------

KVM_ENABLE_CAP = IOW("KVM_ENABLE_CAP", KVMIO, 0xA3, kvm_enable_cap)
KVM_SET_DEVICE_ATTR = IOW("KVM_SET_DEVICE_ATTR", KVMIO, 0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR = IOW("KVM_GET_DEVICE_ATTR", KVMIO, 0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR = IOW("KVM_HAS_DEVICE_ATTR", KVMIO, 0xE3, kvm_device_attr)

# ---- requests: a vCPU --------------------------------------------------------------------------------------------

KVM_RUN = IO("KVM_RUN", KVMIO, 0x80)
KVM_SET_SIGNAL_MASK = IOW("KVM_SET_SIGNAL_MASK", KVMIO, 0x8B, kvm_signal_mask)
KVM_GET_MP_STATE = IOR("KVM_GET_MP_STATE", KVMIO, 0x98, kvm_mp_state)
KVM_SET_MP_STATE = IOW("KVM_SET_MP_STATE", KVMIO, 0x99, kvm_mp_state)
KVM_GET_ONE_REG = IOW("KVM_GET_ONE_REG", KVMIO, 0xAB, kvm_one_reg)
KVM_SET_ONE_REG = IOW("KVM_SET_ONE_REG", KVMIO, 0xAC, kvm_one_reg)
KVM_GET_REG_LIST = IOWR("KVM_GET_REG_LIST", KVMIO, 0xB0, kvm_reg_list)
KVM_PRE_FAULT_MEMORY = IOWR("KVM_PRE_FAULT_MEMORY", KVMIO, 0xD5, kvm_pre_fault_memory)
