# SPDX-License-Identifier: Apache-2.0
"""A virtual machine: its slots, vCPUs, devices, doorbells and interrupts. Made by System.create_vm."""

from __future__ import annotations

import errno as _errno
from ctypes import addressof, c_uint8

from pyvmm.kvm.device import KvmDevice
from pyvmm.kvm.stats import MeasuredFd
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.uapi.kvm import (
    KVM_CHECK_EXTENSION,
    KVM_CREATE_DEVICE,
    KVM_CREATE_DEVICE_TEST,
    KVM_CREATE_VCPU,
    KVM_MEM_GUEST_MEMFD,
    KVM_SET_DEVICE_ATTR,
    KVM_SET_USER_MEMORY_REGION,
    DeviceType,
    kvm_create_device,
    kvm_device_attr,
    kvm_userspace_memory_region,
)
from pyvmm.uapi.kvm_arm64 import (
    KVM_ARM_PREFERRED_TARGET,
    KVM_ARM_VM_SMCCC_CTRL,
    KVM_ARM_VM_SMCCC_FILTER,
    kvm_vcpu_init,
)
from pyvmm.uapi.kvm_cap import KVM_CAP_IMMEDIATE_EXIT, cap_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.guest_memfd import GuestMemfd
    from pyvmm.kvm.system import System


class Vm(MeasuredFd):
    """A VM. It ends when it, its vCPUs, its guest_memfds and their mappings are closed; :meth:`close` does all that."""

    kind = "vm"

    def __init__(self, fd: int, system: System) -> None:
        super().__init__(fd, system)
        self.system = system

    def check(self, cap: int) -> int:
        """Return this VM's KVM_CHECK_EXTENSION. A protected VM may deny what works: use :meth:`offers`."""
        return self.call(KVM_CHECK_EXTENSION, cap, cap=cap_name(cap))

    def offers(self, cap: int) -> int:
        """Return what this VM has of a KVM_CAP_*: 0 is no.

        That is the VM's own answer, unless the VM denies what every VM has, as protected ones of Linux 7.3 do: they
        deny most of what works on them. Then it is the host's answer.
        """
        own = self.check(cap)
        return own if own or self.check(KVM_CAP_IMMEDIATE_EXIT) else self.system.check(cap)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """Switch on a capability, with up to four arguments."""
        from pyvmm.uapi.kvm_state import KVM_ENABLE_CAP, kvm_enable_cap

        argument = kvm_enable_cap(cap=cap, flags=flags)
        argument.args[: len(args)] = list(args)
        self.call(KVM_ENABLE_CAP, argument, cap=cap_name(cap), args=" ".join(map(hex, args)) or None)

    # ---- vCPUs and devices ----

    def create_vcpu(self, index: int) -> Vcpu:
        """Make the vCPU with this number. Make all before the interrupt controller's init and the first run."""
        return Vcpu(self.call(KVM_CREATE_VCPU, index, index=index), self, index)

    def preferred_target(self) -> kvm_vcpu_init:
        """Return the preferred target to initialise arm64 vCPUs with, without features."""
        target = kvm_vcpu_init()
        self.call(KVM_ARM_PREFERRED_TARGET, target)
        return target

    def create_device(self, type: DeviceType) -> KvmDevice:
        """Make a device inside the kernel."""
        argument = kvm_create_device(type=type)
        self.call(KVM_CREATE_DEVICE, argument, type=type)
        return KvmDevice(argument.fd, self, type)

    def has_device(self, type: DeviceType) -> bool:
        """Whether the kernel could make such a device, without making it."""
        asked = kvm_create_device(type=type, flags=KVM_CREATE_DEVICE_TEST)
        _, errno = self.attempt(KVM_CREATE_DEVICE, asked, type=type, flags=KVM_CREATE_DEVICE_TEST)
        if errno not in (0, _errno.ENODEV):
            raise self.error(KVM_CREATE_DEVICE.name, errno, type=type)
        return not errno

    # ---- memory ----

    def set_memory(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        *,
        flags: int = 0,
        guest_memfd: GuestMemfd | None = None,
        offset: int = 0,
    ) -> None:
        """Put memory at ``gpa``: ``size`` bytes at the host's ``hva``, all multiples of 4096.

        With ``guest_memfd``, faults use its pages from ``offset``. ``hva`` should then be its mapping, for the kernel's
        own devices. ``flags`` are KVM_MEM_LOG_DIRTY_PAGES and KVM_MEM_READONLY.
        """
        if guest_memfd is None:
            region = kvm_userspace_memory_region(
                slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva
            )
            self.call(KVM_SET_USER_MEMORY_REGION, region, slot=slot, gpa=gpa, size=size, hva=hva, flags=flags)
            return
        from pyvmm.uapi.kvm_memory import KVM_SET_USER_MEMORY_REGION2, kvm_userspace_memory_region2

        flags |= KVM_MEM_GUEST_MEMFD
        region2 = kvm_userspace_memory_region2(
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=size,
            userspace_addr=hva,
            guest_memfd=guest_memfd.fileno() & 0xFFFF_FFFF,
            guest_memfd_offset=offset,
        )
        self.call(
            KVM_SET_USER_MEMORY_REGION2,
            region2,
            slot=slot,
            gpa=gpa,
            size=size,
            hva=hva,
            flags=flags,
            guest_memfd=guest_memfd.fileno(),
            offset=offset,
            memfd_flags=guest_memfd.flags,
        )

    def delete_memory(self, slot: int) -> None:
        """Remove a slot. Guest accesses there become MMIO exits. EPERM in a protected VM that has run."""
        self.call(KVM_SET_USER_MEMORY_REGION, kvm_userspace_memory_region(slot=slot), slot=slot, size=0)

    def create_guest_memfd(self, size: int, flags: int) -> GuestMemfd:
        """Make a file of guest memory of ``size`` bytes; ``flags`` are GUEST_MEMFD_FLAG_*; arm64's slots need MMAP."""
        from pyvmm.kvm.guest_memfd import GuestMemfd
        from pyvmm.uapi.kvm_memory import KVM_CREATE_GUEST_MEMFD, kvm_create_guest_memfd

        fd = self.call(KVM_CREATE_GUEST_MEMFD, kvm_create_guest_memfd(size=size, flags=flags), size=size, flags=flags)
        return GuestMemfd(fd, self, size, flags)

    def dirty_log(self, slot: int, pages: int) -> bytes:
        """Return the written pages of a slot of ``pages`` since the last call, one bit per page."""
        from pyvmm.uapi.kvm_memory import KVM_GET_DIRTY_LOG, kvm_dirty_log

        bitmap = (c_uint8 * (-(-pages // 64) * 8))()
        argument = kvm_dirty_log(slot=slot)
        argument.dirty_bitmap = addressof(bitmap)
        self.call(KVM_GET_DIRTY_LOG, argument, slot=slot)
        return bytes(bitmap)

    # ---- hypercalls ----

    def forward_smccc(self, base: int, count: int) -> None:
        """Forward ``count`` SMCCC function ids from ``base`` as KVM_EXIT_HYPERCALL. Call it before the first run.

        Not in a protected VM (EINVAL), nor for the Arm architecture's own ranges (EEXIST).
        """
        from pyvmm.uapi.kvm_arm64_vcpu import SmcccFilterAction, kvm_smccc_filter

        wanted = kvm_smccc_filter(base=base, nr_functions=count, action=SmcccFilterAction.KVM_SMCCC_FILTER_FWD_TO_USER)
        argument = kvm_device_attr(group=KVM_ARM_VM_SMCCC_CTRL, attr=KVM_ARM_VM_SMCCC_FILTER, addr=addressof(wanted))
        self.call(KVM_SET_DEVICE_ATTR, argument, attr="KVM_ARM_VM_SMCCC_FILTER", base=base, count=count)

    # ---- doorbells and interrupts: of the guests that have them ----

    def ioeventfd(self, fd: int, gpa: int, size: int, *, datamatch: int | None = None, deassign: bool = False) -> None:
        """Make the guest's stores to ``gpa`` write 1 to an eventfd inside the kernel, or undo that.

        ``size`` is 1, 2, 4 or 8 bytes, 0 for any (and then no ``datamatch``).
        """
        from pyvmm.uapi import kvm_irq

        flags = kvm_irq.KVM_IOEVENTFD_FLAG_DEASSIGN if deassign else 0
        flags |= kvm_irq.KVM_IOEVENTFD_FLAG_DATAMATCH if datamatch is not None else 0
        argument = kvm_irq.kvm_ioeventfd(fd=fd, addr=gpa, len=size, datamatch=datamatch or 0, flags=flags)
        self.call(kvm_irq.KVM_IOEVENTFD, argument, fd=fd, gpa=gpa, size=size, datamatch=datamatch, flags=flags)

    def irqfd(self, fd: int, gsi: int, *, resample: int | None = None, deassign: bool = False) -> None:
        """Make writes to an eventfd raise an interrupt, or undo that. ``resample`` is an eventfd written at its EOI."""
        from pyvmm.uapi import kvm_irq

        flags = kvm_irq.KVM_IRQFD_FLAG_DEASSIGN if deassign else 0
        flags |= kvm_irq.KVM_IRQFD_FLAG_RESAMPLE if resample is not None else 0
        argument = kvm_irq.kvm_irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resample or 0)
        self.call(kvm_irq.KVM_IRQFD, argument, fd=fd, gsi=gsi, resample=resample, flags=flags)

    def create_irqchip(self) -> None:
        """Make x86's interrupt controllers; arm64 has a device instead."""
        from pyvmm.uapi import kvm_irq

        self.call(kvm_irq.KVM_CREATE_IRQCHIP)

    def irq_line(self, irq: int, level: bool) -> None:
        """Set an interrupt line; on arm64 ``irq`` is type << 24 | vCPU << 16 | number (KVM_ARM_IRQ_*)."""
        from pyvmm.uapi import kvm_irq

        argument = kvm_irq.kvm_irq_level(level=level)
        argument.irq = irq
        self.call(kvm_irq.KVM_IRQ_LINE, argument, irq=irq, level=int(level))

    def signal_msi(self, address: int, data: int, *, devid: int | None = None) -> bool:
        """Deliver a message-signalled interrupt (``devid`` for the ITS); False if the guest has it blocked."""
        from pyvmm.uapi import kvm_irq

        flags = kvm_irq.KVM_MSI_VALID_DEVID if devid is not None else 0
        argument = kvm_irq.kvm_msi(
            address_lo=address & 0xFFFF_FFFF, address_hi=address >> 32, data=data, flags=flags, devid=devid or 0
        )
        return self.call(kvm_irq.KVM_SIGNAL_MSI, argument, address=address, data=data, devid=devid) > 0
