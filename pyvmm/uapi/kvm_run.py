# SPDX-License-Identifier: Apache-2.0
"""``struct kvm_run`` of linux/kvm.h: the page that a vCPU and its VMM share, and exit reasons.

The exits of other architectures (ppc, s390, riscv, loongarch) and of confidential x86 guests are left out of the
union; ``padding`` fixes its size. ``debug.arch`` differs between arm64 and x86, so it is here twice.
"""

from __future__ import annotations

from ctypes import Structure, Union
from enum import IntEnum

from pyvmm.uapi.kvm_arm64_vcpu import kvm_debug_exit_arch as debug_exit_arm64
from pyvmm.uapi.kvm_x86 import kvm_debug_exit_arch as debug_exit_x86
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint8, c_uint64

    from pyvmm.uapi.layout import u8, u16, u32, u64


class ExitReason(IntEnum):
    """``kvm_run.exit_reason``. Valid only after a KVM_RUN that returned 0, or failed as documented for the reason."""

    KVM_EXIT_UNKNOWN = 0
    KVM_EXIT_EXCEPTION = 1
    KVM_EXIT_IO = 2
    KVM_EXIT_HYPERCALL = 3
    KVM_EXIT_DEBUG = 4
    KVM_EXIT_HLT = 5
    KVM_EXIT_MMIO = 6
    KVM_EXIT_IRQ_WINDOW_OPEN = 7
    KVM_EXIT_SHUTDOWN = 8
    KVM_EXIT_FAIL_ENTRY = 9
    KVM_EXIT_INTR = 10
    KVM_EXIT_SET_TPR = 11
    KVM_EXIT_TPR_ACCESS = 12
    KVM_EXIT_S390_SIEIC = 13
    KVM_EXIT_S390_RESET = 14
    KVM_EXIT_DCR = 15
    KVM_EXIT_NMI = 16
    KVM_EXIT_INTERNAL_ERROR = 17
    KVM_EXIT_OSI = 18
    KVM_EXIT_PAPR_HCALL = 19
    KVM_EXIT_S390_UCONTROL = 20
    KVM_EXIT_WATCHDOG = 21
    KVM_EXIT_S390_TSCH = 22
    KVM_EXIT_EPR = 23
    KVM_EXIT_SYSTEM_EVENT = 24
    KVM_EXIT_S390_STSI = 25
    KVM_EXIT_IOAPIC_EOI = 26
    KVM_EXIT_HYPERV = 27
    KVM_EXIT_ARM_NISV = 28
    KVM_EXIT_X86_RDMSR = 29
    KVM_EXIT_X86_WRMSR = 30
    KVM_EXIT_DIRTY_RING_FULL = 31
    KVM_EXIT_AP_RESET_HOLD = 32
    KVM_EXIT_X86_BUS_LOCK = 33
    KVM_EXIT_XEN = 34
    KVM_EXIT_RISCV_SBI = 35
    KVM_EXIT_RISCV_CSR = 36
    KVM_EXIT_NOTIFY = 37
    KVM_EXIT_LOONGARCH_IOCSR = 38
    KVM_EXIT_MEMORY_FAULT = 39
    KVM_EXIT_TDX = 40
    KVM_EXIT_ARM_SEA = 41
    KVM_EXIT_ARM_LDST64B = 42
    KVM_EXIT_SNP_REQ_CERTS = 43


class SystemEvent(IntEnum):
    """``kvm_run.system_event.type``."""

    KVM_SYSTEM_EVENT_SHUTDOWN = 1
    KVM_SYSTEM_EVENT_RESET = 2
    KVM_SYSTEM_EVENT_CRASH = 3
    KVM_SYSTEM_EVENT_WAKEUP = 4
    KVM_SYSTEM_EVENT_SUSPEND = 5
    KVM_SYSTEM_EVENT_SEV_TERM = 6
    KVM_SYSTEM_EVENT_TDX_FATAL = 7


KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0

KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3
KVM_EXIT_ARM_SEA_FLAG_GPA_VALID = 1 << 0
KVM_NOTIFY_CONTEXT_INVALID = 1 << 0

SYNC_REGS_SIZE_BYTES = 2048


@layout()
class _hw(Structure):
    hardware_exit_reason: u64


@layout()
class _fail_entry(Structure):
    hardware_entry_failure_reason: u64
    cpu: u32


@layout()
class _ex(Structure):
    exception: u32
    error_code: u32


@layout()
class _io(Structure):
    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


@layout(data=8)
class _mmio(Structure):
    phys_addr: u64
    data: Array[c_uint8]
    len: u32
    is_write: u8


@layout()
class _hypercall_tail(Union):
    longmode: u32
    flags: u64


@layout(args=6)
class _hypercall(Structure):
    _anonymous_ = ("_tail",)
    nr: u64
    args: Array[c_uint64]
    ret: u64
    _tail: _hypercall_tail


@layout(data=16)
class _internal(Structure):
    suberror: u32
    ndata: u32
    data: Array[c_uint64]


@layout(insn_bytes=15)
class _emulation_failure(Structure):
    suberror: u32
    ndata: u32
    flags: u64
    insn_size: u8
    insn_bytes: Array[c_uint8]


@layout(data=16)
class _system_event_tail(Union):
    flags: u64
    data: Array[c_uint64]


@layout()
class _system_event(Structure):
    _anonymous_ = ("_tail",)
    type: u32
    ndata: u32
    _tail: _system_event_tail


@layout()
class _eoi(Structure):
    vector: u8


@layout()
class _arm_nisv(Structure):
    esr_iss: u64
    fault_ipa: u64


@layout(pad=7)
class _msr(Structure):
    error: u8
    pad: Array[c_uint8]
    reason: u32
    index: u32
    data: u64


@layout()
class _notify(Structure):
    flags: u32


@layout()
class _memory_fault(Structure):
    flags: u64
    gpa: u64
    size: u64


@layout()
class _arm_sea(Structure):
    flags: u64
    esr: u64
    gva: u64
    gpa: u64


@layout(padding=256)
class _exit(Union):
    hw: _hw
    fail_entry: _fail_entry
    ex: _ex
    io: _io
    debug_arm64: debug_exit_arm64
    debug_x86: debug_exit_x86
    mmio: _mmio
    hypercall: _hypercall
    internal: _internal
    emulation_failure: _emulation_failure
    system_event: _system_event
    eoi: _eoi
    arm_nisv: _arm_nisv
    msr: _msr
    notify: _notify
    memory_fault: _memory_fault
    arm_sea: _arm_sea
    padding: Array[c_uint8]


@layout(padding1=6, s=SYNC_REGS_SIZE_BYTES)
class kvm_run(Structure):
    """The start of a vCPU's mapping; the kernel writes it while a thread is inside KVM_RUN."""

    _anonymous_ = ("_exit",)
    request_interrupt_window: u8
    immediate_exit: u8
    padding1: Array[c_uint8]
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
    _exit: _exit
    kvm_valid_regs: u64
    kvm_dirty_regs: u64
    s: Array[c_uint8]
