# SPDX-License-Identifier: Apache-2.0
"""What a kind of device is: values that describe one, what makes it of them, and how a command line asks for it.

A kind is one file, here in :mod:`pyvmm.devices.kinds` or in somebody else's package::

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

All of that is imported to parse a command line that names the kind, and those of pyvmm for every command line: what is
heavy, or native, is imported in ``make``.
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
        """What a specification may ask of the machine that is to have it; see pyvmm.machine.config."""

        @property
        def protection(self) -> Protection:
            """Whose the guest's memory is."""
            ...

        @property
        def memory(self) -> int:
            """Bytes of RAM."""
            ...

        @property
        def backing(self) -> str:
            """What that is made of."""
            ...

        @property
        def devices(self) -> Sequence[DeviceSpec]:
            """All devices that the machine is to have."""
            ...


class Context:
    """What a device may need to know of its machine.

    ``native`` is the ``struct pv_vm *``, ``ram`` the guest's addresses of its memory, and ``pool`` the bytes of its DMA
    pool: where there is one, drivers are to use it, also where they need not. ``unheard`` is told why what the guest
    prints can no longer be written. With ``planned`` the machine is a plan: no interface is made, no program started,
    no disk locked, no socket listened at.
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
        """Whether the guest's memory is closed to the host."""
        return self.protection.isolates


class DeviceSpec(ABC):
    """What one device is to be: plain values, checked when it is made. Two of equal values are equal."""

    virtio: ClassVar[bool] = True
    """Whether it makes a virtio device, whose driver needs a DMA pool where memory is private."""

    def check(self, guest: Guest) -> None:  # noqa: B027 - most kinds suit every guest
        """Raise UsageError where ``guest`` cannot have it."""

    def check_restored(self, snapshot: str) -> None:  # noqa: B027 - most kinds can be saved
        """Raise UsageError where the guest of the file ``snapshot`` would miss what it knows of the device."""

    @abstractmethod
    def make(self, context: Context) -> Device | VirtioDevice:
        """Make the device, placed nowhere yet. Raises UsageError and HostError where it cannot be had."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class Around:
    """What a run has beside its options: the descriptors of the virtio console, and the programs of the host.

    ``size`` is columns and rows of the terminal that ``out`` is, None where it is none. ``find_program`` returns the
    path of a program that is called so.
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

    ``option`` is how. pyvmm's own kinds have an option each. Of others it has the kind's name alone, and is what stands
    behind that in ``--device NAME``. ``spec`` makes a specification of an option's value; None where the value asks for
    no device.
    """

    def __init__(self, option: Option, spec: Callable[[Any, Around], DeviceSpec | None]) -> None:
        self.option = option
        self.spec = spec
