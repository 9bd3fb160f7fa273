# SPDX-License-Identifier: Apache-2.0
"""asm/kvm.h of x86: the part for a small real-mode guest and the architecture-neutral tests."""

from __future__ import annotations

from ctypes import Structure

from pyvmm.uapi.ioctl import IO, IOR, IOW
from pyvmm.uapi.kvm import KVM_REG_SIZE_U64, KVM_REG_X86, KVMIO
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint16, c_uint64

    from pyvmm.uapi.layout import u8, u16, u32, u64

KVM_PIO_PAGE_OFFSET = 1
KVM_COALESCED_MMIO_PAGE_OFFSET = 2
KVM_DIRTY_LOG_PAGE_OFFSET = 64

KVM_NR_INTERRUPTS = 256
KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2

KVM_GUESTDBG_USE_SW_BP = 0x0001_0000
KVM_GUESTDBG_USE_HW_BP = 0x0002_0000
KVM_GUESTDBG_INJECT_DB = 0x0004_0000
KVM_GUESTDBG_INJECT_BP = 0x0008_0000
KVM_GUESTDBG_BLOCKIRQ = 0x0010_0000


@layout()
class kvm_regs(Structure):
    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@layout()
class kvm_segment(Structure):
    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8  # noqa: E741 - the kernel's name
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@layout(padding=3)
class kvm_dtable(Structure):
    base: u64
    limit: u16
    padding: Array[c_uint16]


@layout(interrupt_bitmap=(KVM_NR_INTERRUPTS + 63) // 64)
class kvm_sregs(Structure):
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: Array[c_uint64]


@layout()
class kvm_debug_exit_arch(Structure):
    exception: u32
    pad: u32
    pc: u64
    dr6: u64
    dr7: u64


@layout(debugreg=8)
class kvm_guest_debug_arch(Structure):
    debugreg: Array[c_uint64]


@layout()
class kvm_guest_debug(Structure):
    """linux/kvm.h; here because its size is the architecture's."""

    control: u32
    pad: u32
    arch: kvm_guest_debug_arch


KVM_SET_TSS_ADDR = IO("KVM_SET_TSS_ADDR", KVMIO, 0x47)
KVM_GET_REGS = IOR("KVM_GET_REGS", KVMIO, 0x81, kvm_regs)
KVM_SET_REGS = IOW("KVM_SET_REGS", KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS = IOR("KVM_GET_SREGS", KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS = IOW("KVM_SET_SREGS", KVMIO, 0x84, kvm_sregs)
KVM_SET_GUEST_DEBUG = IOW("KVM_SET_GUEST_DEBUG", KVMIO, 0x9B, kvm_guest_debug)

KVM_X86_REG_TYPE_MSR = 2


def KVM_X86_REG_MSR(index: int) -> int:
    """Return the ONE_REG id of a model-specific register."""
    return KVM_REG_X86 | KVM_REG_SIZE_U64 | KVM_X86_REG_TYPE_MSR << 32 | index
