# SPDX-License-Identifier: Apache-2.0
"""Place the devices of a configuration or a script: each gets a window and an interrupt line.

The bus owns the devices and closes them. Windows are assigned in order, the configuration's devices first. A virtio
device gets a transport in the virtio-mmio window. Others are placed in the next window, each at a 64 KiB boundary, so
that a guest with 64 KiB pages can map one without the next.
"""

from __future__ import annotations

from functools import partial

from pyvmm.devices.base import Device, Trigger
from pyvmm.devices.virtio.device import VirtioDevice
from pyvmm.devices.virtio.mmio import VirtioMmio
from pyvmm.devices.virtio.registers import SIZE
from pyvmm.errors import UsageError, hex_
from pyvmm.machine import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from pyvmm.devices.bus import Bus
    from pyvmm.devices.kind import Context, DeviceSpec
    from pyvmm.machine.irq import Interrupts, Line
    from pyvmm.machine.kicks import Kicks

#: Every virtio device needs an interrupt, and their number is limited.
MOST_VIRTIO: Final = min(layout.VIRTIO_MMIO.size // SIZE, layout.SPIS - layout.VIRTIO_SPI)
_ALIGNMENT: Final = 0x1_0000


def place(
    specs: Sequence[DeviceSpec],
    brought: list[Device | VirtioDevice],
    context: Context,
    bus: Bus,
    interrupts: Interrupts,
    kicks: Kicks,
) -> tuple[VirtioMmio, ...]:
    """Make the devices of ``specs``, put them and the ``brought`` ones on the bus, and return the transports.

    A brought device is removed from its list when the bus owns it. Raises UsageError for too many devices, and the
    devices' own errors.
    """
    count = sum(spec.virtio for spec in specs) + sum(isinstance(device, VirtioDevice) for device in brought)
    if count > MOST_VIRTIO:
        raise UsageError(f"{count} virtio devices: a machine can have at most {MOST_VIRTIO}")
    places = _Places(context, bus, interrupts, kicks)
    for spec in specs:
        places.take(spec.make(context))
    while brought:
        places.take(brought.pop(0))
    return tuple(places.transports)


class _Places:
    """The free windows and lines."""

    def __init__(self, context: Context, bus: Bus, interrupts: Interrupts, kicks: Kicks) -> None:
        self._context, self._bus, self._interrupts, self._kicks = context, bus, interrupts, kicks
        self.transports: list[VirtioMmio] = []
        self._kinds: dict[str, int] = {}
        self._next = layout.OTHER_DEVICES.start
        self._spi = layout.OTHER_SPI

    def take(self, device: Device | VirtioDevice) -> None:
        """Place a device. If that fails, close it."""
        try:
            transport, base, line = self._behind(device) if isinstance(device, VirtioDevice) else self._plain(device)
        except BaseException:
            device.close()
            raise
        self._bus.add(transport, base, line)

    def _behind(self, device: VirtioDevice) -> tuple[VirtioMmio, int, Line]:
        number = self._kinds[device.name] = self._kinds.get(device.name, -1) + 1
        device.name_it(f"{device.name}{number}")
        context, index = self._context, len(self.transports)
        line = self._interrupts.edge(layout.VIRTIO_SPI + index)
        base = layout.VIRTIO_MMIO.start + index * SIZE
        transport = VirtioMmio(
            device,
            context.native,
            line,
            private=context.private,
            pooled=bool(context.pool),
            hand_over=partial(self._kicks.hand_over, base),
        )
        self.transports.append(transport)
        return transport, base, line

    def _plain(self, device: Device) -> tuple[Device, int, Line | None]:
        base = self._next
        self._next += -(-device.size // _ALIGNMENT) * _ALIGNMENT
        if device.size <= 0 or self._next > layout.OTHER_DEVICES.end:
            raise UsageError(
                f"device {device.name} of {device.size:#x} bytes has no place: there are "
                f"{hex_(layout.OTHER_DEVICES.size)} for all non-virtio devices, each at a multiple of "
                f"{hex_(_ALIGNMENT)}"
            )
        device.line = line = None if device.trigger is None else self._line(device, device.trigger)
        device.placed_at(base)
        return device, base, line

    def _line(self, device: Device, trigger: Trigger) -> Line:
        spi = self._spi
        if spi >= layout.VIRTIO_SPI:
            most = layout.VIRTIO_SPI - layout.OTHER_SPI
            raise UsageError(
                f"no interrupt line for device {device.name}: the machine has only {most} for such devices"
            )
        self._spi += 1
        return self._interrupts.edge(spi) if trigger is Trigger.EDGE else self._interrupts.level(spi)
