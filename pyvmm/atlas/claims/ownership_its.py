# SPDX-License-Identifier: Apache-2.0
"""Claims about what the kernel's interrupt controller reads of a guest's memory.

An ITS (Arm IHI 0069, chapter 5) takes its commands, and the properties of the interrupts that they make, from tables in
memory. In a guest KVM is the ITS.
"""

from __future__ import annotations

import errno

from pyvmm.atlas.claim import group
from pyvmm.errors import KvmError
from pyvmm.experiment import Experiment
from pyvmm.machine.layout import GIC_ITS, GIC_REDISTRIBUTORS
from pyvmm.memory.address import Gpa
from pyvmm.pages import HOST_PAGE, LARGEST_PAGE

claim = group("ownership")

VALID = 1 << 63
# Offsets: Arm IHI 0069, 12.18 (GITS_*) and 12.11 (GICR_*).
CTLR, CBASER, CWRITER, CREADR, BASER, TRANSLATER = 0x0, 0x80, 0x88, 0x90, 0x100, 0x1_0040
PROPBASER, PENDBASER = 0x70, 0x78
LPI = 8192
"""The number of the first LPI."""
MAPD, MAPC, MAPTI = 0x08, 0x09, 0x0A
"""Commands: give a device a table, a collection a vCPU, and a device's event an LPI (5.3)."""
COMMAND = 32
"""Bytes of a command."""


class _Tables:
    """What the guest gives its ITS: a queue with three commands, and the tables of LPIs."""

    def __init__(self, x: Experiment) -> None:
        # KVM takes addresses of whole 64 KiB (vgic_sanitise_its_baser(), vgic-its.c).
        self.devices, self.collections, self.queue, self.pending = (self._room(x) for _ in range(4))
        self.properties, self.events = x.page(), x.page()
        commands = (MAPD, 0, VALID | self.events, 0, MAPC, 0, VALID, 0, MAPTI, LPI << 32, 0, 0)
        for number, word in enumerate(commands):
            x.guest.write64(self.queue + 8 * number, word)
        for gpa in (self.devices, self.collections, self.pending, self.properties, self.events):
            x.guest.write64(gpa, 0)

    def _room(self, x: Experiment) -> Gpa:
        return x.page(LARGEST_PAGE // HOST_PAGE, align=LARGEST_PAGE)

    @property
    def read(self) -> tuple[Gpa, ...]:
        """The pages that KVM has to read for these commands."""
        return self.queue, self.properties, self.pending


def _carried_out(x: Experiment, tables: _Tables) -> bool:
    """Have the ITS carry out the commands. Returns whether the event has its LPI then."""
    its, redistributor = GIC_ITS.start, GIC_REDISTRIBUTORS.start
    x.guest.write64(redistributor + PROPBASER, tables.properties | 15)  # 16 bits of interrupt numbers
    x.guest.write64(redistributor + PENDBASER, tables.pending)
    for number, table in enumerate((tables.devices, tables.collections)):
        x.guest.write64(its + BASER + 8 * number, VALID | table)
    x.guest.write64(its + CBASER, VALID | tables.queue)
    x.guest.write32(its + CTLR, 1)
    x.guest.write64(its + CWRITER, 3 * COMMAND)
    x.check("the ITS has gone past all commands", x.guest.read64(its + CREADR), 3 * COMMAND)
    try:
        x.machine.vm.signal_msi(its + TRANSLATER, 0, devid=0)
    except KvmError as error:
        if error.errno != errno.EBUSY:
            raise
        return True  # it knows the event, and this guest has not enabled LPIs
    return False


@claim(
    emulated="memfd guest_memfd",
    pkvm="memfd",
    origin="arch/arm64/kvm/vgic/vgic-its.c, vgic_its_process_commands(): a command that cannot be read is ignored",
)
def an_its_reads_no_private_table(x: Experiment) -> None:
    """An ITS ignores commands in a private page, and the guest keeps the page: it must share what its ITS reads."""
    if x.machine.gic is None or x.machine.gic.its is None:
        x.cannot("this host's KVM makes no ITS")
    tables = _Tables(x)
    x.check("an event that private commands map is known", _carried_out(x, tables), False)
    x.check("the guest then finds its command", x.guest.read64(tables.queue), MAPD)


@claim(
    emulated="memfd guest_memfd",
    pkvm="memfd",
    origin="arch/arm64/kvm/vgic/vgic-its.c, vgic_its_process_commands() by kvm_read_guest_lock()",
)
def an_its_reads_shared_tables(x: Experiment) -> None:
    """An ITS carries out commands in a shared page, with shared tables of LPIs."""
    if x.machine.gic is None or x.machine.gic.its is None:
        x.cannot("this host's KVM makes no ITS")
    tables = _Tables(x)
    for gpa in tables.read:
        x.guest.share(gpa)
    x.check("an event that shared commands map is known", _carried_out(x, tables), True)
    x.check("the guest then finds its command", x.guest.read64(tables.queue), MAPD)
