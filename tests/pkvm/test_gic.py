# SPDX-License-Identifier: Apache-2.0
"""The interrupt controller in the kernel, as a guest sees it, and the ways in which interrupts reach it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pyvmm.devices.base import Trigger
from pyvmm.experiment import Experiment
from pyvmm.guest.puppet import Puppet
from pyvmm.machine import layout
from pyvmm.machine.irq import SPI_BASE
from pyvmm.protection import Protection

pytestmark = pytest.mark.pkvm

# Arm IHI 0069, chapter 12: offsets in the distributor, ...
PIDR2 = 0xFFE8
"""12.9.38: bits 7 to 4 are the architecture's revision."""
GICD_ISPENDR, GICD_ICPENDR, GICD_ICFGR = 0x200, 0x280, 0xC00
# ... a redistributor, ...
GICR_CTLR, GICR_TYPER, GICR_PROPBASER, GICR_PENDBASER = 0x0, 0x8, 0x70, 0x78
LAST = 1 << 4
# ... and the ITS. Messages are written to a word in its second 64 KiB.
GITS_CTLR, GITS_CBASER, GITS_CWRITER, GITS_CREADR, GITS_BASER = 0x0, 0x80, 0x88, 0x90, 0x100
GITS_TRANSLATER = 0x1_0040
VALID = 1 << 63
MAPD, MAPC, MAPTI = 0x08, 0x09, 0x0A

DEVICE, EVENT, LPI = 5, 2, 8192
TABLE = 0x1_0000
"""Bytes: tables are aligned to it, and the ITS has no smaller pages."""


@pytest.mark.parametrize("protection", Protection)
def test_every_machine_has_a_gicv3_with_a_redistributor_for_each_vcpu(protection: Protection) -> None:
    with Experiment(protection, cpus=2) as x:
        assert x.guest.read32(layout.GIC_DISTRIBUTOR.start + PIDR2) >> 4 & 0xF == 3
        types = [x.guest.read64(layout.GIC_REDISTRIBUTORS.start + n * 0x2_0000 + GICR_TYPER) for n in range(2)]
    assert [type_ >> 8 & 0xFFFF for type_ in types] == [0, 1]
    assert [bool(type_ & LAST) for type_ in types] == [False, True]


def pending(guest: Puppet, spi: int) -> bool:
    number = SPI_BASE + spi
    return bool(guest.read32(layout.GIC_DISTRIBUTOR.start + GICD_ISPENDR + number // 32 * 4) >> number % 32 & 1)


def trigger(guest: Puppet, spi: int, kind: Trigger) -> None:
    """Set the trigger of a line in the controller, as a guest's kernel does."""
    number = SPI_BASE + spi
    edge = 0b10 if kind is Trigger.EDGE else 0
    guest.write32(layout.GIC_DISTRIBUTOR.start + GICD_ICFGR + number // 16 * 4, edge << 2 * (number % 16))


def until(condition: Callable[[], bool]) -> bool:
    """Wait for the kernel: a worker reads an irqfd asynchronously."""
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("protection", Protection)
def test_a_pulse_on_an_edge_line_leaves_its_interrupt_pending(protection: Protection) -> None:
    spi = layout.VIRTIO_SPI + 7
    number = SPI_BASE + spi
    with Experiment(protection) as x:
        line = x.machine.interrupts.edge(spi)
        trigger(x.guest, spi, Trigger.EDGE)
        assert not pending(x.guest, spi)
        for _ in range(2):
            line.trigger()
            assert until(lambda: pending(x.guest, spi))
            x.guest.write32(layout.GIC_DISTRIBUTOR.start + GICD_ICPENDR + number // 32 * 4, 1 << number % 32)
            assert not pending(x.guest, spi)


@pytest.mark.parametrize("protection", Protection)
def test_the_uarts_interrupt_stays_pending_while_its_cause_lasts(protection: Protection) -> None:
    data, mask, clear = (layout.PL011.start + offset for offset in (0x00, 0x38, 0x44))
    transmitted = 1 << 5
    with Experiment(protection) as x:
        trigger(x.guest, layout.PL011_SPI, Trigger.LEVEL)
        x.guest.write32(data, ord("."))
        assert not pending(x.guest, layout.PL011_SPI)
        x.guest.write32(mask, transmitted)
        assert pending(x.guest, layout.PL011_SPI)
        x.guest.write32(clear, transmitted)
        assert not pending(x.guest, layout.PL011_SPI)


@pytest.mark.parametrize("protection", Protection)
def test_a_message_raises_the_interrupt_that_the_guest_mapped_it_to(protection: Protection) -> None:
    its, redistributor = layout.GIC_ITS.start, layout.GIC_REDISTRIBUTORS.start
    message = its + GITS_TRANSLATER
    with Experiment(protection) as x:
        guest, send = x.guest, x.machine.vm.signal_msi
        devices, collections, events, properties, pendings, commands = (
            x.page(TABLE // 4096, align=TABLE) for _ in range(6)
        )
        if protection is not Protection.NONE:
            # The kernel reads these tables from guest memory.
            for table in (properties, pendings, commands):
                guest.share(table, TABLE // 4096)
        guest.fill(pendings, TABLE)
        guest.write8(properties, 0xA0 | 0b11)  # the first LPI: its priority, enabled
        guest.write64(redistributor + GICR_PROPBASER, properties | 13)  # numbers of 14 bits
        guest.write64(redistributor + GICR_PENDBASER, pendings)
        guest.write32(redistributor + GICR_CTLR, 1)
        guest.write64(its + GITS_CBASER, VALID | commands)
        guest.write64(its + GITS_BASER, VALID | devices)
        guest.write64(its + GITS_BASER + 8, VALID | collections)
        guest.write32(its + GITS_CTLR, 1)
        assert not send(message, EVENT, devid=DEVICE)
        words = (
            *(MAPD | DEVICE << 32, 4, VALID | events, 0),  # events of 5 bits
            *(MAPC, 0, VALID, 0),  # collection 0 is vCPU 0's
            *(MAPTI | DEVICE << 32, EVENT | LPI << 32, 0, 0),
        )
        for number, word in enumerate(words):
            guest.write64(commands + 8 * number, word)
        guest.write64(its + GITS_CWRITER, 8 * len(words))
        assert guest.read64(its + GITS_CREADR) == 8 * len(words)
        assert send(message, EVENT, devid=DEVICE)
        assert not send(message, EVENT + 1, devid=DEVICE)
        assert not send(message, EVENT, devid=DEVICE + 1)
