# SPDX-License-Identifier: Apache-2.0
"""Virtio devices get their windows, lines and names from the machine, and are always closed."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from pyvmm.devices.base import Device, Trigger
from pyvmm.devices.bus import Bus
from pyvmm.devices.kind import DeviceSpec
from pyvmm.devices.kinds.balloon import Balloon
from pyvmm.devices.kinds.console import Console
from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.roles import MemoryBalloon, Printing, Terminal
from pyvmm.devices.virtio.device import Feature
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.devices import MOST_VIRTIO, place
from pyvmm.machine.fdt import cells64
from pyvmm.machine.irq import Interrupts
from pyvmm.machine.machine import Machine
from pyvmm.machine.plan import Plan
from pyvmm.memory.address import MIB
from pyvmm.protection import Protection
from tests.virtio_board import Toy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.devices.virtio.queue import Queue
    from tests.virtqueue_rig import Guest


class Context:
    """The parts of the machine's context that placing devices needs."""

    def __init__(self, guest: Guest, *, private: bool, pool: int) -> None:
        self.native, self.private, self.pool = guest.native, private, pool


class ToySpec(DeviceSpec):
    """Makes toys, and records them."""

    def __init__(self) -> None:
        self.made: list[Toy] = []

    def make(self, context: object) -> Toy:  # noqa: ARG002
        toy: Any = Toy()
        closing = toy.close

        def close() -> None:
            toy.closed = True
            closing()

        toy.close = close
        self.made.append(toy)
        return cast(Toy, toy)


@pytest.fixture
def machine(guest: Guest) -> Iterator[Any]:
    spec = ToySpec()
    bus, interrupts = Bus(guest.native), Interrupts(None, present=False)  # type: ignore[arg-type]
    offered: list[tuple[int, Queue]] = []

    def build(
        count: int, brought: Sequence[Device | VirtioDevice] = (), *, private: bool = False, pool: int = 0
    ) -> Any:
        context: Any = Context(guest, private=private, pool=pool)
        kicks: Any = SimpleNamespace(hand_over=lambda base, queue: offered.append((base, queue)))
        return place([spec] * count, list(brought), context, bus, interrupts, kicks)

    build.bus, build.interrupts, build.made, build.offered = bus, interrupts, spec.made, offered  # type: ignore[attr-defined]
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


def test_kicks_of_each_device_are_handed_over_by_its_address(machine: Any) -> None:
    for transport in machine(2):
        transport._hand_over(transport.queues[0])
    bases = [placed.base for placed in machine.bus.placed]
    assert [(base, queue.index) for base, queue in machine.offered] == [(base, 0) for base in bases]


def test_each_device_learns_that_memory_is_private(machine: Any) -> None:
    assert [transport.private for transport in machine(2, private=True)] == [True, True]


def test_more_devices_than_lines_are_refused(machine: Any) -> None:
    with pytest.raises(UsageError, match=f"a machine can have at most {MOST_VIRTIO}"):
        machine(MOST_VIRTIO + 1)
    assert machine.made == []


def test_a_device_that_cannot_be_placed_is_closed(machine: Any) -> None:
    machine.interrupts.edge(layout.VIRTIO_SPI + 1)
    with pytest.raises(UsageError, match="SPI 33"):
        machine(2)
    assert [getattr(device, "closed", False) for device in machine.made] == [False, True]


@pytest.mark.parametrize("pool", [0, 1 << 20])
def test_drivers_must_use_the_pool_if_there_is_one_with_rings_that_allow_it(machine: Any, pool: int) -> None:
    [transport] = machine(1, pool=pool)
    assert bool(transport.offered & Feature.ACCESS_PLATFORM) == bool(pool)
    assert bool(transport.offered & Feature.RING_PACKED) == (not pool)


class Plain(Device):
    """A device that is not on a bus of pyvmm's."""

    name = "plain"
    compatible = "test,plain"

    def __init__(self, size: int = 0x1000) -> None:
        super().__init__(size)
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Pulsed(Plain):
    """A device that needs an edge line."""

    trigger = Trigger.EDGE


class Held(Plain):
    """A device that needs a level line."""

    trigger = Trigger.LEVEL


def test_devices_of_a_script_are_placed_after_the_others(machine: Any) -> None:
    plain, pulsed, held, toy = Plain(0x1_0001), Pulsed(), Held(), Toy()
    machine(1, [plain, toy, pulsed, held])
    where = {placed.device.behind: (placed.base, placed.line) for placed in machine.bus.placed}
    assert [where[device][0] for device in (plain, pulsed, held)] == [0x0B00_0000, 0x0B02_0000, 0x0B03_0000]
    assert where[toy][0] == 0x0A00_0200
    assert toy.label == "toy1"
    assert where[plain][1] is None
    assert plain.line is None
    assert [(device.line.spi, device.line.kind) for device in (pulsed, held)] == [(2, 1), (3, 4)]
    assert [where[device][1] for device in (pulsed, held)] == [pulsed.line, held.line]
    pulsed.line.trigger()
    held.line.hold(True)


@pytest.mark.parametrize(
    ("device", "count", "said"),
    [
        (lambda: Plain(0x100_0001), 1, "has no place"),
        (lambda: Plain(0), 1, "has no place"),
        (Pulsed, 31, "the machine has only 30"),
        (lambda: Plain(0x10_0000), 17, "has no place"),
    ],
)
def test_a_device_without_an_address_is_refused_and_closed(machine: Any, device: Any, count: int, said: str) -> None:
    devices = [device() for _ in range(count)]
    with pytest.raises(UsageError, match=said):
        machine(0, devices)
    assert devices[-1].closed == 1
    machine.bus.close()
    assert [each.closed for each in devices] == [1] * count


@pytest.mark.parametrize("protection", list(Protection))
def test_a_machine_describes_a_given_device_to_its_guest(protection: Protection) -> None:
    config = MachineConfig(kernel="payload:hello", protection=protection)
    device = Pulsed()
    with Plan(config, devices=[device]) as plan:
        [placed] = [placed for placed in plan.machine.bus.placed if placed.device is device]
        assert (placed.base, placed.line) == (layout.OTHER_DEVICES.start, device.line)
        tree = plan.machine.entry.tree
        assert tree is not None
        [node] = [node for node in tree.root.children if node.name == "plain@b000000"]
        assert node.properties["compatible"] == ("test,plain",)
        assert node.properties["reg"] == cells64(0xB00_0000, 0x1000)
        assert node.properties["interrupts"] == (0, layout.OTHER_SPI, Trigger.EDGE)
        assert plan.machine.pool == 0
    assert device.closed == 1


def test_a_virtio_device_of_a_script_gets_a_pool_if_memory_is_private() -> None:
    config = MachineConfig(kernel="payload:hello", protection=Protection.PKVM)
    with Plan(config, devices=[Toy()]) as plan:
        assert plan.machine.pool == 8 * MIB
        [transport] = plan.machine.virtio
        assert transport.offered & Feature.ACCESS_PLATFORM


def test_devices_of_a_machine_that_cannot_be_built_are_closed() -> None:
    devices = [Plain(), Plain(0x200_0000), Plain()]
    with pytest.raises(UsageError, match="has no place"), Plan(MachineConfig(kernel="payload:hello"), devices=devices):
        pass
    assert [device.closed for device in devices] == [1, 1, 1]
    with (
        pytest.raises(UsageError, match="no such file"),
        Plan(MachineConfig(kernel="/nowhere"), devices=[last := Plain()]),
    ):
        pass
    assert last.closed == 1


def test_devices_are_closed_if_the_host_cannot_run_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    devices = [Plain(), Plain()]
    with (
        pytest.raises(HostError, match="this host is x86_64"),
        Machine(MachineConfig(kernel="payload:hello"), devices=devices),
    ):
        pass
    assert [device.closed for device in devices] == [1, 1]


class Sticking(Plain):
    """A device that cannot be closed."""

    def close(self) -> None:
        super().close()
        raise PyvmmError("it sticks")


def test_devices_are_closed_even_if_another_cannot_be() -> None:
    devices = [Plain(0x200_0000), Plain(), Sticking(), Plain()]
    with pytest.raises(PyvmmError, match="it sticks"), Plan(MachineConfig(kernel="payload:hello"), devices=devices):
        pass
    assert [device.closed for device in devices] == [1, 1, 1, 1]


def test_a_device_belongs_to_one_machine_and_another_does_not_close_it() -> None:
    config = MachineConfig(kernel="payload:hello")
    device, toy, new = Plain(), Toy(), Plain()
    with Plan(config, devices=[device, toy]) as plan:
        for shared in (device, toy):
            with (
                pytest.raises(UsageError, match=f"device {shared.name} already belongs to another machine"),
                Plan(config, devices=[shared, new := Plain()]),
            ):
                pass
            assert new.closed == 1
        assert device.closed == 0
        assert toy.transport is plan.machine.virtio[0]
    assert device.closed == 1
    with pytest.raises(UsageError, match="already belongs"), Plan(config, devices=[device]):
        pass
    with pytest.raises(UsageError, match="already belongs"), Plan(config, devices=[new := Plain(), new]):
        pass
    assert (device.closed, new.closed) == (1, 1)


def test_roles_are_found_by_type() -> None:
    config = MachineConfig(kernel="payload:hello", devices=(Rng(), Console(), Balloon()))
    with Plan(config) as plan:
        machine = plan.machine
        devices: list[Any] = [transport.device for transport in machine.virtio[1:]]
        console, balloon = devices
        assert machine.role(Terminal) == (console,)
        assert machine.role(MemoryBalloon) == (balloon,)
        assert machine.role(Printing) == (machine.uart, console)
    with Plan(config._replace(devices=())) as plan:
        assert plan.machine.role(Terminal) == plan.machine.role(MemoryBalloon) == ()
