# SPDX-License-Identifier: Apache-2.0
"""Virtio devices get their windows, lines and names from the machine, and are closed whatever happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.devices.bus import Bus
from pyvmm.devices.roles import MemoryBalloon, Printing, Terminal
from pyvmm.devices.virtio.device import Feature
from pyvmm.errors import UsageError
from pyvmm.machine import devices, layout
from pyvmm.machine import virtio as placing
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.irq import Interrupts
from pyvmm.machine.plan import Plan
from pyvmm.machine.virtio import MOST_DEVICES, attach
from tests.virtio_board import Toy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.virtqueue_rig import Guest


class Context:
    """Of the machine's context what placing itself needs."""

    def __init__(self, guest: Guest, *, private: bool, pool: int) -> None:
        self.native, self.private, self.pool = guest.native, private, pool


@pytest.fixture
def machine(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[Toy] = []
    bus, interrupts = Bus(guest.native), Interrupts(None, present=False)  # type: ignore[arg-type]

    def create(_spec: object, _context: object) -> Toy:
        made.append(Toy())
        closing = made[-1].close
        made[-1].close = lambda: (setattr(made[-1], "closed", True), closing())  # type: ignore[method-assign]
        return made[-1]

    monkeypatch.setattr(placing, "create", create)

    def build(count: int, *, private: bool = False, pool: int = 0) -> Any:
        context: Any = Context(guest, private=private, pool=pool)
        return attach([devices.Rng()] * count, context, bus, interrupts)

    build.bus, build.interrupts, build.made = bus, interrupts, made  # type: ignore[attr-defined]
    yield build
    bus.close()
    interrupts.close()


def test_windows_and_lines_follow_the_configuration(machine: Any) -> None:
    transports = machine(3)
    assert [placed.base for placed in machine.bus.placed] == [0x0A00_0000, 0x0A00_0200, 0x0A00_0400]
    assert [placed.line.spi for placed in machine.bus.placed] == [32, 33, 34]
    assert [transport.device.label for transport in transports] == ["toy0", "toy1", "toy2"]
    assert [transport.interrupt.fd for transport in transports] == [placed.line.fd for placed in machine.bus.placed]
    assert machine.bus.placed[0].device.properties() == {"dma-coherent": True}


def test_private_memory_is_told_to_each(machine: Any) -> None:
    assert [transport.private for transport in machine(2, private=True)] == [True, True]


def test_more_than_there_are_lines_for_are_refused(machine: Any) -> None:
    with pytest.raises(UsageError, match=f"a machine has {MOST_DEVICES} at most"):
        machine(MOST_DEVICES + 1)
    assert machine.made == []


def test_a_device_that_cannot_be_placed_is_closed(machine: Any) -> None:
    machine.interrupts.edge(layout.VIRTIO_SPI + 1)
    with pytest.raises(UsageError, match="SPI 33"):
        machine(2)
    assert [getattr(device, "closed", False) for device in machine.made] == [False, True]


@pytest.mark.parametrize("pool", [0, 1 << 20])
def test_drivers_are_asked_to_go_by_way_of_a_pool_where_there_is_one_with_rings_that_wait_for_it(
    machine: Any, pool: int
) -> None:
    [transport] = machine(1, pool=pool)
    assert bool(transport.offered & Feature.ACCESS_PLATFORM) == bool(pool)
    assert bool(transport.offered & Feature.RING_PACKED) == (not pool)


def test_roles_are_found_by_type() -> None:
    config = MachineConfig(kernel="payload:hello", devices=(devices.Rng(), devices.Console(), devices.Balloon()))
    with Plan(config) as plan:
        machine = plan.machine
        console, balloon = (transport.device for transport in machine.virtio[1:])
        assert machine.role(Terminal) == (console,)
        assert machine.role(MemoryBalloon) == (balloon,)
        assert machine.role(Printing) == (machine.uart, console)
    with Plan(config._replace(devices=())) as plan:
        assert plan.machine.role(Terminal) == plan.machine.role(MemoryBalloon) == ()
