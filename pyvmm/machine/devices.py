# SPDX-License-Identifier: Apache-2.0
"""The devices a machine is to have beside its own: plain values, one class for each kind, checked when it is made."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyvmm.devices.virtio.vsock_packet import check_cid
from pyvmm.errors import UsageError
from pyvmm.machine.config import DeviceSpec
from pyvmm.protection import Protection

if TYPE_CHECKING:
    from ipaddress import IPv4Interface

    from pyvmm.machine.config import MachineConfig

DISK_QUEUES: Final = 16
DISK_SERIAL: Final = 20
"""Bytes of the string that a disk answers GET_ID with (virtio 1.2, 5.2.6)."""


@dataclass(frozen=True)
class Rng(DeviceSpec):
    """An entropy device, fed by the host's random number generator."""


@dataclass(frozen=True)
class Disk(DeviceSpec):
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

    def check(self, config: MachineConfig) -> None:
        """Raise UsageError for a file that two of the guest's disks are to be, one of them writable."""
        disks = [disk for disk in config.devices if isinstance(disk, Disk)]
        if self is not disks[0]:  # which answers for all: to resolve a path takes a system call for each part of it
            return
        files: dict[str, list[Disk]] = {}
        for disk in disks:
            files.setdefault(os.path.realpath(disk.path), []).append(disk)
        for same in files.values():
            if len(same) > 1 and not all(disk.read_only for disk in same):
                raise UsageError(
                    f"disk {same[0].path!r} is given {len(same)} times, and the guest may write to it",
                    hint="make a copy of it, or add ,ro to each",
                )


@dataclass(frozen=True)
class Net(DeviceSpec):
    """A network card; exactly one of ``tap``, ``passt`` and ``socket`` is not empty: what it is connected to.

    ``tap`` is a tap's name, ``passt`` the program to start, ``socket`` the path of one that runs. ``address`` is what
    the host's end of a tap is to have, ``10.0.0.1/24``; ``forwards`` are TCP ports that passt takes for the guest, the
    host's first; with ``loopback`` passt lets the guest reach what listens on the host's 127.0.0.1; ``mac`` is the
    card's, made from the host's and the tap's name where it is empty.
    """

    tap: str = ""
    passt: str = ""
    socket: str = ""
    mac: str = ""
    address: str = ""
    forwards: tuple[tuple[int, int], ...] = ()
    loopback: bool = False

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
        for what, asked in (("ports to forward", self.forwards), ("the host's loopback", self.loopback)):
            if asked and not self.passt:
                raise UsageError(f"{what} with {given[0]}: only a passt that is started here can be told of that")
        for port in (port for pair in self.forwards for port in pair):
            if not 1 <= port <= 65535:
                raise UsageError(f"port {port}: ports are 1 to 65535")
        if self.tap:
            from pyvmm.devices.virtio.tap import check_name

            check_name(self.tap)
        if self.mac:
            from pyvmm.devices.virtio.net import parse_mac

            parse_mac(self.mac)
        self.interface()

    def interface(self) -> IPv4Interface | None:
        """Return what the host's end of a tap is to have; UsageError where that is no such address."""
        if not self.address:
            return None
        from ipaddress import IPv4Interface

        with contextlib.suppress(ValueError):
            if "/" in self.address:
                return IPv4Interface(self.address)
        raise UsageError(f"{self.address!r} is no IPv4 address with a prefix, as 10.0.0.1/24")


@dataclass(frozen=True)
class Console(DeviceSpec):
    """A virtio console, ``hvc0`` of a Linux guest, between descriptors that somebody else closes.

    ``size`` is columns and rows of the terminal it goes to, None where it is none.
    """

    out: int | None = None
    source: int | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Vsock(DeviceSpec):
    """The guest's stream sockets at ``cid``, and the host's at the Unix socket ``path`` and ``path_PORT``."""

    path: str
    cid: int

    def __post_init__(self) -> None:
        """Raise UsageError for a cid that no guest can have."""
        check_cid(self.cid)


@dataclass(frozen=True)
class Balloon(DeviceSpec):
    """A balloon that is to hold ``size`` bytes of the guest's memory from the start, and hears of what is free."""

    size: int = 0

    def check(self, config: MachineConfig) -> None:
        """Raise UsageError where nothing could be given back, or not so much."""
        if config.protection is Protection.PKVM:
            raise UsageError(
                "a balloon with protection pkvm: the host's kernel pins what a protected guest touches until its end, "
                "so nothing could be given back; and Linux's driver keeps its rings where the host cannot look",
                hint="give the guest less memory: it takes what it touches, no more",
            )
        if config.protection is Protection.EMULATED:
            raise UsageError(
                "a balloon with protection emulated: Linux's driver keeps its rings in private memory (it turns "
                "ACCESS_PLATFORM down), where the host does not look",
                hint="use --protection none for a balloon",
            )
        if config.backing == "hugetlb":
            raise UsageError(
                "a balloon with the hugetlb backing: the guest gives pages of 4 KiB, and these have 2 MiB",
                hint="use --backing thp for huge pages that can be taken apart",
            )
        if not 0 <= self.size <= config.memory:
            raise UsageError(
                f"a balloon of {self.size:#x} bytes: the guest has {config.memory:#x}",
                hint="name what the guest is to give up, not what it is to keep",
            )
