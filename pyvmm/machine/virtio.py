# SPDX-License-Identifier: Apache-2.0
"""Makes the virtio devices that a configuration names, and places them: a window and an interrupt line for each.

The devices belong to the bus, which closes them. Their order is the configuration's, and so is that of their windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pyvmm.devices.virtio.mmio import VirtioMmio
from pyvmm.devices.virtio.registers import SIZE
from pyvmm.errors import UsageError
from pyvmm.log import get_logger
from pyvmm.machine import devices, layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.devices.bus import Bus
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.devices.virtio.netbackend import NetBackend
    from pyvmm.machine.config import DeviceSpec
    from pyvmm.machine.irq import Interrupts
    from pyvmm.memory.memory import Memory
    from pyvmm.protection import Protection

log = get_logger("virtio")

#: A device has an interrupt, and those have an end.
MOST_DEVICES: Final = min(layout.VIRTIO_MMIO.size // SIZE, layout.SPIS - layout.VIRTIO_SPI)


@dataclass(frozen=True)
class Context:
    """What a device may need to know of its machine; ``native`` is the ``struct pv_vm *``."""

    native: Any
    protection: Protection
    memory: Memory
    ram: range
    unheard: Callable[[OSError], None]
    """Told why a console's output can no longer be written."""
    planned: bool = False
    """The machine is a plan: no interface is made, no program started, for what would be behind a network card, no disk
    locked, no socket listened at."""

    pool: int = 0
    """Bytes of the guest's DMA pool: where there is one, drivers are to use it, also where they need not."""

    @property
    def private(self) -> bool:
        """Whether the guest's memory is closed to the host."""
        return self.protection.isolates


def create(spec: DeviceSpec, context: Context) -> VirtioDevice:
    """Make the device that ``spec`` describes, behind no transport yet. Raises as the device does."""
    match spec:
        case devices.Net():
            from pyvmm.devices.virtio.net import VirtioNet, parse_mac

            mac = parse_mac(spec.mac) if spec.mac else None
            return VirtioNet(_planned_network() if context.planned else _network(spec), mac)
        case devices.Rng():
            from pyvmm.devices.virtio.rng import VirtioRng

            if context.private:
                log.warning(
                    "entropy_from_the_host",
                    protection=context.protection.value,
                    meaning="a guest that does not trust the host must not count what this device gives as random",
                )
            return VirtioRng()
        case devices.Console():
            from pyvmm.devices.virtio.console import VirtioConsole

            return VirtioConsole(spec.out, spec.source, size=spec.size, unheard=context.unheard)
        case devices.Vsock():
            from pyvmm.devices.virtio.vsock import VirtioVsock

            return VirtioVsock(spec.path, spec.cid, listen=not context.planned)
        case devices.Balloon():
            from pyvmm.devices.virtio.balloon import VirtioBalloon

            return VirtioBalloon(context.memory, context.ram, spec.size)
        case devices.Disk():
            from pyvmm.devices.virtio.blk import VirtioBlk
            from pyvmm.devices.virtio.disk import DiskFile

            disk = DiskFile(spec.path, read_only=spec.read_only, lock=not context.planned)
            return VirtioBlk(disk, queues=spec.queues, serial=spec.serial, private=context.private, pool=context.pool)
        case _:
            raise TypeError(f"{spec!r} is no device that pyvmm knows")


def _planned_network() -> NetBackend:
    import os

    from pyvmm.devices.virtio.netbackend import Stream

    return Stream("planned", os.eventfd(0, os.EFD_CLOEXEC))


def _network(spec: devices.Net) -> NetBackend:
    if spec.tap:
        from pyvmm.devices.virtio.tap import Tap

        return Tap(spec.tap, spec.interface())
    if spec.passt:
        from pyvmm.devices.virtio.passt import Passt

        return Passt(spec.passt, spec.forwards, loopback=spec.loopback)
    from pyvmm.devices.virtio.netbackend import Stream

    return Stream.connect(spec.socket)


def attach(specs: Sequence[DeviceSpec], context: Context, bus: Bus, interrupts: Interrupts) -> tuple[VirtioMmio, ...]:
    """Make all devices and put them on the bus. Raises UsageError where there are too many, and as devices do."""
    if len(specs) > MOST_DEVICES:
        raise UsageError(f"{len(specs)} virtio devices: a machine has {MOST_DEVICES} at most")
    placed = []
    kinds: dict[str, int] = {}
    for number, spec in enumerate(specs):
        device = create(spec, context)
        try:
            count = kinds[device.name] = kinds.get(device.name, -1) + 1
            device.name_it(f"{device.name}{count}")
            line = interrupts.edge(layout.VIRTIO_SPI + number)
            transport = VirtioMmio(device, context.native, line, private=context.private, pooled=bool(context.pool))
        except BaseException:
            device.close()
            raise
        placed.append(bus.add(transport, layout.VIRTIO_MMIO.start + number * SIZE, line))
    return tuple(placed)
