# SPDX-License-Identifier: Apache-2.0
"""A kind of device: its specification, its factory, and its command line option.

A kind is one file, in :mod:`pyvmm.devices.kinds` or in another package::

    class Dice(DeviceSpec):
        virtio = False

        def __init__(self, sides: int = 6) -> None:
            self.sides = sides

        def make(self, context: Context) -> Device:
            return DiceDevice(self.sides)

    KIND = DeviceKind(
        Option("dice", type=Parts({"sides": parse_count}), metavar="[sides=N]", help="a dice, thrown by a load"),
        lambda value, around: Dice(**value),
    )

Parsing a command line imports the kinds that it names, and always all of pyvmm's own. So import everything heavy or
native inside of ``make``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, ClassVar, Protocol

    from pyvmm._native import pv_vm
    from pyvmm.devices.base import Device
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.memory.memory import Memory
    from pyvmm.protection import Protection
    from pyvmm.syntax.option import Option

    class Guest(Protocol):
        """The machine's properties that a specification may check; see pyvmm.machine.config."""

        @property
        def protection(self) -> Protection:
            """The protection of guest memory."""
            ...

        @property
        def memory(self) -> int:
            """Bytes of RAM."""
            ...

        @property
        def backing(self) -> str:
            """The backing of RAM."""
            ...

        @property
        def devices(self) -> Sequence[DeviceSpec]:
            """All devices of the configuration."""
            ...


class Context:
    """The machine's properties that a device may need.

    ``native`` is the ``struct pv_vm *``, ``ram`` the guest's addresses of its memory, and ``pool`` the size of its DMA
    pool in bytes. If there is a pool, drivers must use it. ``unheard`` is called with the reason when the guest's
    output can no longer be written. With ``planned`` the machine is only a plan: the device creates no interface,
    starts no program, locks no disk, and listens at no socket.
    """

    def __init__(
        self,
        native: pv_vm,
        protection: Protection,
        memory: Memory,
        ram: range,
        unheard: Callable[[OSError], None],
        *,
        planned: bool = False,
        pool: int = 0,
    ) -> None:
        self.native, self.protection, self.memory, self.ram = native, protection, memory, ram
        self.unheard, self.planned, self.pool = unheard, planned, pool

    @property
    def private(self) -> bool:
        """Whether guest memory can be private."""
        return self.protection.isolates


class DeviceSpec(ABC):
    """The specification of one device: plain values, checked by the constructor. Equal values compare equal."""

    virtio: ClassVar[bool] = True
    """Whether it makes a virtio device, whose driver needs a DMA pool with private memory."""

    def check(self, guest: Guest) -> None:  # noqa: B027 - most kinds suit every guest
        """Raise UsageError if ``guest`` cannot have it."""

    def check_restored(self, snapshot: str) -> None:  # noqa: B027 - most kinds can be saved
        """Raise UsageError if the device differs from the one in the file ``snapshot``."""

    @abstractmethod
    def make(self, context: Context) -> Device | VirtioDevice:
        """Make the device for the machine of ``context``, not placed yet. Raises UsageError or HostError."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class Around:
    """A run's context besides its options: the descriptors of the virtio console, and the host's programs.

    ``size`` is the columns and rows of the terminal ``out``, or None. ``find_program`` returns the path of a named
    program.
    """

    def __init__(
        self,
        out: int | None = None,
        source: int | None = None,
        size: tuple[int, int] | None = None,
        find_program: Callable[[str], str] = str,
    ) -> None:
        self.out, self.source, self.size = out, source, size
        self.find_program = find_program


class DeviceKind:
    """A kind of device that a command line can ask for.

    Each of pyvmm's own kinds has an ``option``. In other packages the option has only the kind's name, and parses the
    text after it in ``--device NAME``. ``spec`` makes a specification from an option's value, or None if the value
    means no device.
    """

    def __init__(self, option: Option, spec: Callable[[Any, Around], DeviceSpec | None]) -> None:
        self.option = option
        self.spec = spec
