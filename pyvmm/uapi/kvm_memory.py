# SPDX-License-Identifier: Apache-2.0
"""linux/kvm.h: memory beyond plain slots: guest_memfd, attributes, dirty logs, coalesced MMIO."""

from __future__ import annotations

from ctypes import Structure, Union

from pyvmm.uapi.ioctl import IO, IOW, IOWR
from pyvmm.uapi.kvm import KVMIO
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint8, c_uint64

    from pyvmm.uapi.layout import pointer, u32, u64

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1
KVM_DIRTY_GFN_F_MASK = 0x3
KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3


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


KVM_GET_DIRTY_LOG = IOW("KVM_GET_DIRTY_LOG", KVMIO, 0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION2 = IOW("KVM_SET_USER_MEMORY_REGION2", KVMIO, 0x49, kvm_userspace_memory_region2)
KVM_REGISTER_COALESCED_MMIO = IOW("KVM_REGISTER_COALESCED_MMIO", KVMIO, 0x67, kvm_coalesced_mmio_zone)
KVM_UNREGISTER_COALESCED_MMIO = IOW("KVM_UNREGISTER_COALESCED_MMIO", KVMIO, 0x68, kvm_coalesced_mmio_zone)
KVM_CLEAR_DIRTY_LOG = IOWR("KVM_CLEAR_DIRTY_LOG", KVMIO, 0xC0, kvm_clear_dirty_log)
KVM_RESET_DIRTY_RINGS = IO("KVM_RESET_DIRTY_RINGS", KVMIO, 0xC7)
KVM_SET_MEMORY_ATTRIBUTES = IOW("KVM_SET_MEMORY_ATTRIBUTES", KVMIO, 0xD2, kvm_memory_attributes)
KVM_CREATE_GUEST_MEMFD = IOWR("KVM_CREATE_GUEST_MEMFD", KVMIO, 0xD4, kvm_create_guest_memfd)
KVM_PRE_FAULT_MEMORY = IOWR("KVM_PRE_FAULT_MEMORY", KVMIO, 0xD5, kvm_pre_fault_memory)
