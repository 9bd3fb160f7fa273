# SPDX-License-Identifier: Apache-2.0
"""What every device is to the machine: a window of registers, how the native loop treats it, and its device-tree node.

A device that answers in Python implements :meth:`Device.read` and :meth:`Device.write`; the others hand the loop a
``state`` that C works on and are never called for an access. All methods may be called from any vCPU's thread.

This module needs nothing native: a device that answers in Python can be described without loading any of that.
"""

from __future__ import annotations

from enum import IntEnum

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Protocol

    from pyvmm._native import CData

    class Line(Protocol):
        """A device's interrupt line, as far as its device-tree node goes; see pyvmm.machine.irq."""

        @property
        def spi(self) -> int:
            """The number of the shared interrupt, from 0."""
            ...

        @property
        def kind(self) -> Trigger:
            """How it is given."""
            ...


class Trigger(IntEnum):
    """How an interrupt is given, as the device tree says it (Linux include/dt-bindings/interrupt-controller/irq.h)."""

    EDGE = 1
    LEVEL = 4


class Device:
    """A window of ``size`` bytes of MMIO.

    ``name`` is its name for people, and of its device-tree node unless ``node`` is one. ``compatible`` is what a driver
    finds it by, one string or several, and ``clocks`` names its clock inputs. ``kind`` is how the native loop treats an
    access (enum pv_kind), None where Python answers.

    A device with a ``trigger`` is given an interrupt ``line`` when it is placed, before the guest starts. The line of
    an EDGE has ``trigger()``, which gives one pulse, that of a LEVEL ``hold(high)``. Any thread may call both.
    """

    name: ClassVar[str]
    compatible: ClassVar[str | tuple[str, ...]]
    node: ClassVar[str | None] = None
    clocks: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[int | None] = None
    trigger: ClassVar[Trigger | None] = None
    taken: bool = False
    """Whether a machine has been given it, and closes it."""

    def __init__(self, size: int = 0x1000) -> None:
        self.size = size
        self.state: CData | None = None
        self.line: Any = None

    @property
    def behind(self) -> object:
        """What serves the guest: the device itself, or the one behind a transport."""
        return self

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
        """Say in a few words what name and window do not: what is behind it, its queues."""
        return ""

    def info(self) -> dict[str, Any]:
        """Say more of itself, plain values of JSON, to who asks a running machine; any thread."""
        return {}

    def pause(self) -> None:
        """Begin nothing more, in guest memory or of interrupts, and return when nothing is under way.

        Called when the vCPUs stand still, in any thread but theirs; :meth:`resume` comes before they go on. Never twice
        in a row.
        """

    def resume(self) -> None:
        """Go on with what :meth:`pause` stopped."""

    def save(self) -> dict[str, Any]:
        """Return what the device would need to go on elsewhere: plain values of JSON. Called while paused.

        UsageError where that cannot be had, as it is of a device that does not say.
        """
        raise UsageError(f"the device {self.name} cannot be saved", hint="run the guest without it")

    def load(self, saved: dict[str, Any]) -> None:
        """Be as :meth:`save` found another such device; called before the start. UsageError for what cannot be that."""

    def close(self) -> None:
        """Let go of everything; called once, after the last vCPU has stopped."""
