# SPDX-License-Identifier: Apache-2.0
"""linux/kvm.h: interrupt lines, message-signalled interrupts and their routing, and the eventfds on both sides."""

from __future__ import annotations

from ctypes import Structure, Union

from pyvmm.uapi.ioctl import IO, IOW
from pyvmm.uapi.kvm import KVMIO
from pyvmm.uapi.layout import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Array, c_uint8, c_uint32

    from pyvmm.uapi.layout import s32, u32, u64

KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2

KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1

KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2

KVM_MSI_VALID_DEVID = 1 << 0


@layout(pad=36)
class kvm_ioeventfd(Structure):
    datamatch: u64
    addr: u64
    len: u32
    fd: s32
    flags: u32
    pad: Array[c_uint8]


@layout(pad=16)
class kvm_irqfd(Structure):
    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: Array[c_uint8]


@layout()
class _irq_or_status(Union):
    irq: u32
    status: s32


@layout()
class kvm_irq_level(Structure):
    _anonymous_ = ("_irq",)
    _irq: _irq_or_status
    level: u32


@layout()
class kvm_irq_routing_irqchip(Structure):
    irqchip: u32
    pin: u32


@layout()
class _pad_or_devid(Union):
    pad: u32
    devid: u32


@layout()
class kvm_irq_routing_msi(Structure):
    _anonymous_ = ("_devid",)
    address_lo: u32
    address_hi: u32
    data: u32
    _devid: _pad_or_devid


@layout(pad=8)
class _route(Union):
    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    pad: Array[c_uint32]


@layout()
class kvm_irq_routing_entry(Structure):
    gsi: u32
    type: u32
    flags: u32
    pad: u32
    u: _route


@layout()
class kvm_irq_routing(Structure):
    """Followed by ``nr`` kvm_irq_routing_entry."""

    nr: u32
    flags: u32


@layout(pad=12)
class kvm_msi(Structure):
    address_lo: u32
    address_hi: u32
    data: u32
    flags: u32
    devid: u32
    pad: Array[c_uint8]


KVM_CREATE_IRQCHIP = IO("KVM_CREATE_IRQCHIP", KVMIO, 0x60)
KVM_IRQ_LINE = IOW("KVM_IRQ_LINE", KVMIO, 0x61, kvm_irq_level)
KVM_SET_GSI_ROUTING = IOW("KVM_SET_GSI_ROUTING", KVMIO, 0x6A, kvm_irq_routing)
KVM_IRQFD = IOW("KVM_IRQFD", KVMIO, 0x76, kvm_irqfd)
KVM_IOEVENTFD = IOW("KVM_IOEVENTFD", KVMIO, 0x79, kvm_ioeventfd)
KVM_SIGNAL_MSI = IOW("KVM_SIGNAL_MSI", KVMIO, 0xA5, kvm_msi)
