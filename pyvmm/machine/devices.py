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


#: Everything that :attr:`pyvmm.machine.config.MachineConfig.devices` may hold.
DeviceSpec = Rng | Disk
