# SPDX-License-Identifier: Apache-2.0
"""The generation id: in a slot of its own, new in each machine, and new after a restore."""

from __future__ import annotations

import pytest

from pyvmm.devices.kinds.vmgenid import GenerationId
from pyvmm.devices.vmgenid import SIZE, VmGenId
from pyvmm.errors import OptionError
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.fdt import parse
from pyvmm.machine.machine import Machine
from pyvmm.machine.plan import Plan
from pyvmm.memory.address import MIB
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

AT = layout.OTHER_DEVICES.start


def plan() -> Plan:
    return Plan(MachineConfig("payload:hello", memory=8 * MIB, devices=(GenerationId(),)))


def device(machine: Machine) -> VmGenId:
    [found] = [placed.device for placed in machine.bus.placed if isinstance(placed.device, VmGenId)]
    return found


def test_the_id_lies_in_a_slot_that_no_memory_node_names() -> None:
    with plan() as made:
        machine = made.machine
        assert [(slot.gpa, slot.size) for slot in machine.memory.slots] == [
            (AT, HOST_PAGE),
            (layout.RAM_BASE, 8 * MIB),
        ]
        nodes = {node.name: node for node in parse(machine.entry.device_tree, "tree").children}
        assert [name for name in nodes if name.startswith("memory@")] == [f"memory@{layout.RAM_BASE:x}"]
        node = nodes[f"vmgenid@{AT:x}"]
        assert node.properties["compatible"] == b"microsoft,vmgenid\0"
        assert node.properties["reg"] == AT.to_bytes(8, "big") + HOST_PAGE.to_bytes(8, "big")
        assert node.properties["interrupts"] == bytes((0, 0, 0, 0, 0, 0, 0, layout.OTHER_SPI, 0, 0, 0, 1))


def test_every_machine_has_another_id_and_a_restored_one_is_told_of_a_new_one() -> None:
    with plan() as one, plan() as other:
        first, second = (each.machine.memory.read(AT, SIZE) for each in (one, other))
        assert first != second
        assert any(first)
        restored = device(other.machine)
        pulses: list[int] = []
        restored.line.trigger = lambda: pulses.append(1)
        other.machine.memory.write(AT, first)  # as a snapshot does
        restored.load(device(one.machine).save())
        assert other.machine.memory.read(AT, SIZE) not in (first, second)
        assert pulses == [1]


@pytest.mark.parametrize("protection", [Protection.PKVM, Protection.EMULATED])
def test_a_guest_that_cannot_be_saved_is_refused_an_id(protection: Protection) -> None:
    config = MachineConfig("payload:hello", protection, memory=8 * MIB, devices=(GenerationId(),))
    with pytest.raises(OptionError, match=f"a generation id with protection {protection.value}"):
        config.check()
