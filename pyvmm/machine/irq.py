# SPDX-License-Identifier: Apache-2.0
"""Interrupt lines from devices to the guest: shared peripheral interrupts (SPIs) of the controller in the kernel.

Owns the eventfds of edge lines. The machine makes one :class:`Interrupts` once the controller is initialised, and gives
devices their lines. It closes the lines after the devices, whose threads may trigger to the end, and before the VM.

An edge line is an eventfd bound by KVM_IRQFD. A write to it (:meth:`EdgeLine.trigger`, or C through ``pv_signal``) is
one pulse. Pulses that the guest has not taken yet merge. A level line uses KVM_IRQ_LINE on the VM's descriptor, so that
C can raise and lower it. The device keeps its state, and reports only changes.

Both work in a protected VM, even where KVM_CHECK_EXTENSION of the VM denies irqfd. On a host whose KVM makes no
interrupt controller the lines lead nowhere, and the device tree names none.
"""

from __future__ import annotations

import os

from pyvmm.devices.base import Trigger
from pyvmm.errors import UsageError
from pyvmm.machine import layout
from pyvmm.uapi.kvm_arm64 import KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.kvm.vm import Vm

#: Lower interrupt numbers are private to a vCPU (Arm IHI 0069, 2.2.1). SPI n is number SPI_BASE + n.
SPI_BASE: Final = 32


class EdgeLine:
    """An edge-triggered line. ``fd`` is the eventfd to write to. Any thread may use it."""

    kind = Trigger.EDGE

    def __init__(self, spi: int, fd: int) -> None:
        self.spi = spi
        self.fd = fd

    def trigger(self) -> None:
        """Give one pulse."""
        os.eventfd_write(self.fd, 1)


class LevelLine:
    """A level-triggered line. ``vm`` is None if it is unconnected. Any thread may use it.

    ``vm_fd`` (-1 if unconnected) and ``irq`` are the arguments of KVM_IRQ_LINE for C.
    """

    kind = Trigger.LEVEL

    def __init__(self, spi: int, vm: Vm | None) -> None:
        self.spi = spi
        self._vm = vm
        self.vm_fd = -1 if vm is None else vm.fileno()
        self.irq = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | (SPI_BASE + spi)

    def hold(self, high: bool) -> None:
        """Raise or lower the line."""
        if self._vm is not None:
            self._vm.irq_line(self.irq, high)


Line = EdgeLine | LevelLine


class Interrupts:
    """All lines of one VM. ``present`` says whether it has an initialised controller."""

    def __init__(self, vm: Vm, *, present: bool) -> None:
        self.present = present
        self._vm = vm
        self._taken: set[int] = set()
        self._edges: list[EdgeLine] = []

    def edge(self, spi: int) -> EdgeLine:
        """Make the edge line of SPI ``spi``, 0 to layout.SPIS - 1. Raises UsageError if it is taken or out of range."""
        self._take(spi)
        line = EdgeLine(spi, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        try:
            if self.present:
                # The default routing: gsi n is the controller's pin n, SPI n (kvm_vgic_setup_default_irq_routing).
                self._vm.irqfd(line.fd, spi)
        except BaseException:
            os.close(line.fd)
            raise
        self._edges.append(line)
        return line

    def level(self, spi: int) -> LevelLine:
        """Make the level line of SPI ``spi``, initially low. Raises as :meth:`edge`."""
        self._take(spi)
        return LevelLine(spi, self._vm if self.present else None)

    def _take(self, spi: int) -> None:
        if not 0 <= spi < layout.SPIS:
            raise UsageError(f"SPI {spi}: this machine's interrupt controller has SPIs 0 to {layout.SPIS - 1}")
        if spi in self._taken:
            raise UsageError(f"SPI {spi} already belongs to another device")
        self._taken.add(spi)

    def close(self) -> None:
        """Unbind and close the eventfds. Idempotent. No line may be triggered afterwards."""
        lines, self._edges = self._edges, []
        try:
            for line in lines:
                if self.present:
                    self._vm.irqfd(line.fd, line.spi, deassign=True)
        finally:
            for line in lines:
                os.close(line.fd)
