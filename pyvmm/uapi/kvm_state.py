# SPDX-License-Identifier: Apache-2.0
"""linux/kvm.h: queries of an existing VM or vCPU: state, registers, statistics."""

from __future__ import annotations

from ctypes import Structure
from enum import IntEnum

from pyvmm.uapi.ioctl import IO, IOR, IOW, IOWR
from pyvmm.uapi.kvm import KVMIO
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint8, c_uint64

    from pyvmm.uapi.layout import s16, u16, u32, u64

KVM_STATS_TYPE_SHIFT = 0
KVM_STATS_TYPE_MASK = 0xF << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_CUMULATIVE = 0 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_INSTANT = 1 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_PEAK = 2 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_LINEAR_HIST = 3 << KVM_STATS_TYPE_SHIFT
KVM_STATS_TYPE_LOG_HIST = 4 << KVM_STATS_TYPE_SHIFT


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
class kvm_mp_state(Structure):
    mp_state: u32


@layout()
class kvm_reg_list(Structure):
    """Followed by ``n`` ids of 64 bits."""

    n: u64


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


KVM_ENABLE_CAP = IOW("KVM_ENABLE_CAP", KVMIO, 0xA3, kvm_enable_cap)
KVM_GET_STATS_FD = IO("KVM_GET_STATS_FD", KVMIO, 0xCE)
KVM_SET_SIGNAL_MASK = IOW("KVM_SET_SIGNAL_MASK", KVMIO, 0x8B, kvm_signal_mask)
KVM_GET_MP_STATE = IOR("KVM_GET_MP_STATE", KVMIO, 0x98, kvm_mp_state)
KVM_SET_MP_STATE = IOW("KVM_SET_MP_STATE", KVMIO, 0x99, kvm_mp_state)
KVM_GET_REG_LIST = IOWR("KVM_GET_REG_LIST", KVMIO, 0xB0, kvm_reg_list)
