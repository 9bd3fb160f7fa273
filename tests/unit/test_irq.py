# SPDX-License-Identifier: Apache-2.0
"""Interrupt lines: their calls to KVM, and the order in which they are closed."""

from __future__ import annotations

import os

import pytest

from pyvmm.errors import UsageError
from pyvmm.machine import layout
from pyvmm.machine.irq import Interrupts


class Vm:
    """Records KVM_IRQFD; ``refuse`` makes it fail."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.refuse = refuse
        self.calls: list[tuple[int, bool]] = []

    def fileno(self) -> int:
        return 77

    def irqfd(self, fd: int, gsi: int, *, deassign: bool = False) -> None:
        os.fstat(fd)  # it must be open, even when it is unbound
        if self.refuse:
            raise OSError("refused")
        self.calls.append((gsi, deassign))

    def irq_line(self, irq: int, level: bool) -> None:
        self.calls.append((irq, level))


def lines(vm: Vm, *, present: bool = True) -> Interrupts:
    return Interrupts(vm, present=present)  # type: ignore[arg-type]


def test_an_edge_line_is_an_eventfd_bound_to_its_spi_and_unbound_before_it_is_closed() -> None:
    vm = Vm()
    interrupts = lines(vm)
    line = interrupts.edge(33)
    line.trigger()
    line.trigger()
    assert os.eventfd_read(line.fd) == 2
    assert (line.spi, line.kind) == (33, 1)
    interrupts.close()
    interrupts.close()
    assert vm.calls == [(33, False), (33, True)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(line.fd)


def test_a_level_line_numbers_its_spi_as_kvm_irq_line_does() -> None:
    line = lines(Vm()).level(1)
    # Linux Documentation/virt/kvm/api.rst, KVM_IRQ_LINE: type 1 (SPI) at bit 24, numbers from 32 on
    assert (line.vm_fd, line.irq, line.kind) == (77, 0x0100_0021, 4)


def test_python_can_raise_and_lower_a_level_line() -> None:
    vm = Vm()
    line = lines(vm).level(1)
    line.hold(True)
    line.hold(False)
    assert vm.calls == [(0x0100_0021, True), (0x0100_0021, False)]


def test_lines_without_a_controller_have_no_effect() -> None:
    vm = Vm()
    interrupts = lines(vm, present=False)
    interrupts.edge(32).trigger()
    level = interrupts.level(1)
    level.hold(True)
    assert level.vm_fd == -1
    interrupts.close()
    assert vm.calls == []


@pytest.mark.parametrize("spi", [-1, layout.SPIS, 1])
def test_an_spi_that_is_in_use_or_does_not_exist_is_refused(spi: int) -> None:
    interrupts = lines(Vm())
    interrupts.level(1)
    with pytest.raises(UsageError, match=f"SPI {spi}"):
        interrupts.edge(spi)


def test_a_line_that_kvm_refuses_leaves_no_eventfd_behind() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="refused"):
        lines(Vm(refuse=True)).edge(32)
    assert os.listdir("/proc/self/fd") == before
