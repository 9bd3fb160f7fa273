# SPDX-License-Identifier: Apache-2.0
"""linux/seccomp.h, and what its filters are written with: linux/filter.h, linux/bpf_common.h, linux/audit.h."""

from __future__ import annotations

from ctypes import Structure

from pyvmm.uapi.ioctl import IOWR
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint64

    from pyvmm.uapi.layout import s32, s64, u32, u64

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_GET_ACTION_AVAIL = 2

SECCOMP_FILTER_FLAG_TSYNC = 1 << 0
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
SECCOMP_FILTER_FLAG_TSYNC_ESRCH = 1 << 4

SECCOMP_RET_KILL_PROCESS = 0x8000_0000
SECCOMP_RET_ERRNO = 0x0005_0000
SECCOMP_RET_USER_NOTIF = 0x7FC0_0000
SECCOMP_RET_ALLOW = 0x7FFF_0000
SECCOMP_RET_DATA = 0xFFFF

SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1 << 0


@layout(args=6)
class seccomp_data(Structure):
    nr: s32
    arch: u32
    instruction_pointer: u64
    args: Array[c_uint64]


@layout()
class seccomp_notif(Structure):
    id: u64
    pid: u32
    flags: u32
    data: seccomp_data


@layout()
class seccomp_notif_resp(Structure):
    id: u64
    val: s64
    error: s32
    flags: u32


SECCOMP_IOCTL_NOTIF_RECV = IOWR("SECCOMP_IOCTL_NOTIF_RECV", ord("!"), 0, seccomp_notif)
SECCOMP_IOCTL_NOTIF_SEND = IOWR("SECCOMP_IOCTL_NOTIF_SEND", ord("!"), 1, seccomp_notif_resp)

BPF_LD = 0x00
BPF_ALU = 0x04
BPF_JMP = 0x05
BPF_RET = 0x06
BPF_W = 0x00
BPF_ABS = 0x20
BPF_AND = 0x50
BPF_JEQ = 0x10
BPF_K = 0x00

AUDIT_ARCH_AARCH64 = 0xC000_00B7
AUDIT_ARCH_X86_64 = 0xC000_003E
