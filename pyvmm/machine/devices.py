"""The devices a machine is to have beside its own: plain values, one class for each kind, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyvmm.errors import UsageError

DISK_QUEUES: Final = 16
DISK_SERIAL: Final = 20
"""Bytes of the string that a disk answers GET_ID with (virtio 1.2, 5.2.6)."""


@dataclass(frozen=True)
class Rng:
    """An entropy device, fed by the host's random number generator."""


@dataclass(frozen=True)
class Disk:
    """A raw image or a block device at ``path``; ``queues`` are 1 to 16, ``serial`` has 20 bytes at most."""

    path: str
    read_only: bool = False
    queues: int = 1
    serial: str = ""

    def __post_init__(self) -> None:
        """Raise UsageError for values that no disk can have."""
        if not 1 <= self.queues <= DISK_QUEUES:
            raise UsageError(f"disk {self.path!r} with {self.queues} queues: it can have 1 to {DISK_QUEUES}")
        if len(self.serial.encode()) > DISK_SERIAL:
            raise UsageError(f"disk {self.path!r}: serial {self.serial!r} has more than {DISK_SERIAL} bytes")


@dataclass(frozen=True)
class Net:
    """A network card; exactly one of ``tap``, ``passt`` and ``socket`` is not empty: what it is connected to.

    ``tap`` is a tap's name, ``passt`` the program to start, ``socket`` the path of one that runs. ``address`` is what
    the host's end of a tap is to have, ``10.0.0.1/24``; ``forwards`` are TCP ports that passt takes for the guest, the
    host's first; ``mac`` is the card's, made from the host's and the tap's name where it is empty.
    """

    tap: str = ""
    passt: str = ""
    socket: str = ""
    mac: str = ""
    address: str = ""
    forwards: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Raise UsageError for what makes no sense together."""
        given = [kind for kind in ("tap", "passt", "socket") if getattr(self, kind)]
        if len(given) != 1:
            what = f"{' and '.join(given)} at once" if given else "nothing"
            raise UsageError(
                f"a network card connected to {what}", hint="--net tap=NAME, --net passt or --net socket=PATH"
            )
        if self.address and not self.tap:
            raise UsageError(f"an address of the host's end ({self.address}) with {given[0]}: only a tap has one")
        if self.forwards and not self.passt:
            raise UsageError(f"ports to forward with {given[0]}: only a passt that is started here is told of them")
        for port in (port for pair in self.forwards for port in pair):
            if not 1 <= port <= 65535:
                raise UsageError(f"port {port}: ports are 1 to 65535")


#: Everything that :attr:`pyvmm.machine.config.MachineConfig.devices` may hold.
DeviceSpec = Rng | Disk | Net
