# SPDX-License-Identifier: Apache-2.0
"""asm/kvm.h of arm64, rarely used parts: vCPU debugging, events, counters, and the SMCCC filter of a VM."""

from __future__ import annotations

from ctypes import Structure, c_int
from enum import IntEnum

from pyvmm.uapi.ioctl import IOR, IOW
from pyvmm.uapi.kvm import KVMIO
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint8, c_uint32, c_uint64

    from pyvmm.uapi.layout import u8, u16, u32, u64

KVM_ARM_MAX_DBG_REGS = 16


@layout(
    dbg_bcr=KVM_ARM_MAX_DBG_REGS,
    dbg_bvr=KVM_ARM_MAX_DBG_REGS,
    dbg_wcr=KVM_ARM_MAX_DBG_REGS,
    dbg_wvr=KVM_ARM_MAX_DBG_REGS,
)
class kvm_guest_debug_arch(Structure):
    dbg_bcr: Array[c_uint64]
    dbg_bvr: Array[c_uint64]
    dbg_wcr: Array[c_uint64]
    dbg_wvr: Array[c_uint64]


@layout()
class kvm_guest_debug(Structure):
    """linux/kvm.h; here because its size is the architecture's."""

    control: u32
    pad: u32
    arch: kvm_guest_debug_arch


@layout()
class kvm_debug_exit_arch(Structure):
    hsr: u32
    hsr_high: u32
    far: u64


@layout()
class kvm_sync_regs(Structure):
    device_irq_level: u64


@layout(pad=5)
class _exception(Structure):
    serror_pending: u8
    serror_has_esr: u8
    ext_dabt_pending: u8
    pad: Array[c_uint8]
    serror_esr: u64


@layout(reserved=12)
class kvm_vcpu_events(Structure):
    exception: _exception
    reserved: Array[c_uint32]


@layout(pad=3)
class kvm_pmu_event_filter(Structure):
    base_event: u16
    nevents: u16
    action: u8
    pad: Array[c_uint8]


@layout()
class kvm_arm_counter_offset(Structure):
    counter_offset: u64
    reserved: u64


@layout(reserved=13)
class reg_mask_range(Structure):
    addr: u64
    range: u32
    reserved: Array[c_uint32]


class SmcccFilterAction(IntEnum):
    """``enum kvm_smccc_filter_action``."""

    KVM_SMCCC_FILTER_HANDLE = 0
    KVM_SMCCC_FILTER_DENY = 1
    KVM_SMCCC_FILTER_FWD_TO_USER = 2


@layout(pad=15)
class kvm_smccc_filter(Structure):
    base: u32
    nr_functions: u32
    action: u8
    pad: Array[c_uint8]


KVM_SET_GUEST_DEBUG = IOW("KVM_SET_GUEST_DEBUG", KVMIO, 0x9B, kvm_guest_debug)
KVM_GET_VCPU_EVENTS = IOR("KVM_GET_VCPU_EVENTS", KVMIO, 0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS = IOW("KVM_SET_VCPU_EVENTS", KVMIO, 0xA0, kvm_vcpu_events)
KVM_ARM_SET_COUNTER_OFFSET = IOW("KVM_ARM_SET_COUNTER_OFFSET", KVMIO, 0xB5, kvm_arm_counter_offset)
KVM_ARM_GET_REG_WRITABLE_MASKS = IOR("KVM_ARM_GET_REG_WRITABLE_MASKS", KVMIO, 0xB6, reg_mask_range)
KVM_ARM_VCPU_FINALIZE = IOW("KVM_ARM_VCPU_FINALIZE", KVMIO, 0xC2, c_int)
