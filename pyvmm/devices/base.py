# SPDX-License-Identifier: Apache-2.0
"""The machine's view of a device: a window of registers, its handling in the native loop, and its device-tree node.

A device that answers in Python implements :meth:`Device.read` and :meth:`Device.write`; the others give the loop a
``state`` for C, and Python never handles their accesses. All methods may be called from any vCPU's thread.

This module imports nothing native, so a Python device can be described without loading native code.
"""

from __future__ import annotations

from enum import IntEnum

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Protocol

    from pyvmm._native import CData

    class Line(Protocol):
        """The properties of an interrupt line that a device-tree node needs; see pyvmm.machine.irq."""

        @property
        def spi(self) -> int:
            """The number of the shared interrupt, from 0."""
            ...

        @property
        def kind(self) -> Trigger:
            """Its trigger type."""
            ...


class Trigger(IntEnum):
    """An interrupt's trigger, with the device tree's values (Linux include/dt-bindings/interrupt-controller/irq.h)."""

    EDGE = 1
    LEVEL = 4


class Device:
    """A window of ``size`` bytes of MMIO.

    ``name`` is its name in messages, and of its device-tree node unless ``node`` is given. Drivers match
    ``compatible``, one string or several. ``clocks`` names its clock inputs. ``kind`` selects how the native loop
    handles an access (enum pv_kind), None for Python.

    A device with a ``trigger`` gets an interrupt ``line`` when it is placed, before the guest starts. An EDGE line has
    ``trigger()``, which gives one pulse, a LEVEL line ``hold(high)``. Any thread may call both.
    """

    name: ClassVar[str]
    compatible: ClassVar[str | tuple[str, ...]]
    node: ClassVar[str | None] = None
    clocks: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[int | None] = None
    trigger: ClassVar[Trigger | None] = None
    taken: bool = False
    """Whether a machine owns the device, and closes it."""

    def __init__(self, size: int = 0x1000) -> None:
        self.size = size
        self.state: CData | None = None
        self.line: Any = None

    @property
    def behind(self) -> object:
        """The device that serves the guest: this one, or the one behind a transport."""
        return self

    def placed_at(self, base: int) -> None:
        """Learn ``base``, the gpa of the first register. Called once, after ``line`` is set, before the start."""

    def windows(self) -> list[tuple[int, int, int | None, CData | None]]:
        """(offset, size, enum pv_kind, state) of each part; most devices are one part."""
        return [(0, self.size, self.kind, self.state)]

    def read(self, offset: int, size: int, vcpu: int) -> int:  # noqa: ARG002 - the default of a write-only device
        """Answer a load of ``size`` bytes; unknown offsets read as zero."""
        return 0

    def write(self, offset: int, size: int, value: int, vcpu: int) -> None:
        """Take a store of ``size`` bytes; unknown offsets ignore it."""

    def properties(self) -> dict[str, Any]:
        """Return more of the device-tree node than ``compatible`` and ``reg``."""
        return {}

    def about(self) -> str:
        """Return a short text of details, such as its backend and its queues."""
        return ""

    def info(self) -> dict[str, Any]:
        """Return JSON values that describe the device, for ``pyvmm ctl info``. Any thread."""
        return {}

    def pause(self) -> None:
        """Stop accessing guest memory and sending interrupts, and return once pending work is done.

        Called while the vCPUs are paused, in any thread but theirs. :meth:`resume` is called before they resume. Never
        called twice in a row.
        """

    def resume(self) -> None:
        """Resume after :meth:`pause`."""

    def save(self) -> dict[str, Any]:
        """Return the device's state for a snapshot, as JSON values. Called while paused.

        Raises UsageError if it cannot be saved, which is the default.
        """
        raise UsageError(f"the device {self.name} cannot be saved", hint="run the guest without it")

    def load(self, saved: dict[str, Any]) -> None:
        """Restore a state of :meth:`save`, before the start. Raises UsageError for an invalid state."""

    def close(self) -> None:
        """Release everything. Called once, after the last vCPU has stopped."""
