# SPDX-License-Identifier: Apache-2.0
"""The MMIO table: owns ``pv_vm.bus`` and knows which device answers a cold exit.

Built once, before the first run. Overlapping devices are refused. C finds the range, and Python only uses its index.
"""

from __future__ import annotations

import contextlib

from pyvmm._native import ffi, lib
from pyvmm.devices.base import Device
from pyvmm.errors import UsageError, hex_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    from pyvmm._native import CData, pv_vcpu, pv_vm
    from pyvmm.devices.base import Line

    D = TypeVar("D", bound=Device)


class Placed:
    """A device, the gpa of its first register, and its interrupt line, if it has one."""

    __slots__ = ("base", "device", "line")

    def __init__(self, device: Device, base: int, line: Line | None = None) -> None:
        self.device, self.base, self.line = device, base, line

    @property
    def end(self) -> int:
        """One past the last byte of the window."""
        return self.base + self.device.size


class Bus:
    """All devices of one machine, by address."""

    def __init__(self, native_vm: pv_vm) -> None:
        self._vm = native_vm
        self.placed: list[Placed] = []
        self._by_index: list[tuple[Device, int]] = []
        self._keep: list[CData] = []
        self._devices = contextlib.ExitStack()

    def add(self, device: D, base: int, line: Line | None = None) -> D:
        """Place ``device`` at ``base`` and return the placement. The bus closes the device from now on.

        ``line`` is the device's interrupt line, for the device tree. The bus does not use it. Raises UsageError if the
        window overlaps another.
        """
        self._devices.callback(device.close)
        new = Placed(device, base, line)
        for other in self.placed:
            if new.base < other.end and other.base < new.end:
                raise UsageError(
                    f"device {device.name} at [{hex_(new.base)}, {hex_(new.end)}) overlaps {other.device.name} "
                    f"at [{hex_(other.base)}, {hex_(other.end)})"
                )
        self.placed.append(new)
        self.placed.sort(key=lambda p: p.base)
        return device

    def publish(self) -> None:
        """Give the native loop its table. Call it after the last device was added."""
        parts = [
            (placed.base + offset, size, kind, state, placed.device, offset)
            for placed in self.placed
            for offset, size, kind, state in placed.device.windows()
        ]
        parts.sort(key=lambda part: part[0])
        ranges = ffi.new("struct pv_range[]", max(len(parts), 1))
        self._by_index = []
        for index, (base, size, kind, state, device, offset) in enumerate(parts):
            entry = ranges[index]
            entry.base, entry.size, entry.index = base, size, index
            entry.kind = lib.PV_KIND_COLD if kind is None else kind
            entry.state = ffi.NULL if state is None else state
            self._by_index.append((device, offset))
        table = ffi.new("struct pv_bus *")
        table.count, table.ranges = len(parts), ranges
        self._keep = [ranges, table]
        lib.pv_publish_bus(self._vm, table)

    def answer(self, vcpu: pv_vcpu) -> None:
        """Complete the cold access that stopped ``vcpu`` (a ``struct pv_vcpu``)."""
        device, start = self._by_index[vcpu.range.index]
        offset = start + vcpu.offset
        if vcpu.is_write:
            device.write(offset, vcpu.size, vcpu.value, vcpu.index)
        else:
            lib.pv_mmio_reply(vcpu, device.read(offset, vcpu.size, vcpu.index))

    def close(self) -> None:
        """Close every device. The loop must have left."""
        lib.pv_publish_bus(self._vm, ffi.NULL)
        self._devices.close()
        self.placed, self._by_index, self._keep = [], [], []
