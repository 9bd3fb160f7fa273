# SPDX-License-Identifier: Apache-2.0
"""The devices a machine is to have beside its own: plain values, one class for each kind, checked when it is made."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyvmm.devices.virtio.vsock_packet import check_cid
from pyvmm.errors import OptionError
from pyvmm.machine.config import DeviceSpec
from pyvmm.protection import Protection
from pyvmm.syntax.option import about_option

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
            raise OptionError(
                f"disk {self.path!r} with {self.queues} queues: it can have 1 to {DISK_QUEUES}", "disk.queues"
            )
        if len(self.serial.encode()) > DISK_SERIAL:
            raise OptionError(
                f"disk {self.path!r}: serial {self.serial!r} has more than {DISK_SERIAL} bytes", "disk.serial"
            )

    def check(self, config: MachineConfig) -> None:
        """Raise UsageError for a file that two of the guest's disks are to be, one of them writable."""
        disks = [disk for disk in config.devices if isinstance(disk, Disk)]
        if self is not disks[0]:  # which answers for all: to resolve a path takes a system call for each part of it
            return
        files: dict[str, list[int]] = {}
        for number, disk in enumerate(disks):
            files.setdefault(os.path.realpath(disk.path), []).append(number)
        for same in files.values():
            if len(same) > 1 and not all(disks[number].read_only for number in same):
                raise OptionError(
                    f"disk {disks[same[0]].path!r} is given {len(same)} times, and the guest may write to it",
                    *(f"disk[{number}]" for number in same),
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
            raise OptionError(
                f"a network card connected to {what}", "net", hint="--net tap=NAME, --net passt or --net socket=PATH"
            )
        if self.address and not self.tap:
            raise OptionError(
                f"an address of the host's end ({self.address}) with {given[0]}: only a tap has one", "net.host"
            )
        for part, what, asked in (
            ("fwd", "ports to forward", self.forwards),
            ("loopback", "the host's loopback", self.loopback),
        ):
            if asked and not self.passt:
                raise OptionError(
                    f"{what} with {given[0]}: only a passt that is started here can be told of that", f"net.{part}"
                )
        for port in (port for pair in self.forwards for port in pair):
            if not 1 <= port <= 65535:
                raise OptionError(f"port {port}: ports are 1 to 65535", "net.fwd")
        if self.tap:
            from pyvmm.devices.virtio.tap import check_name

            with about_option("net.tap"):
                check_name(self.tap)
        if self.mac:
            from pyvmm.devices.virtio.net import parse_mac

            with about_option("net.mac"):
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
        raise OptionError(f"{self.address!r} is no IPv4 address with a prefix, as 10.0.0.1/24", "net.host")


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
            raise OptionError(
                "a balloon with protection pkvm: the host's kernel pins what a protected guest touches until its end, "
                "so nothing could be given back; and Linux's driver keeps its rings where the host cannot look",
                "balloon",
                "protection",
                hint="give the guest less memory: it takes what it touches, no more",
            )
        if config.protection is Protection.EMULATED:
            raise OptionError(
                "a balloon with protection emulated: Linux's driver keeps its rings in private memory (it turns "
                "ACCESS_PLATFORM down), where the host does not look",
                "balloon",
                "protection",
                hint="use --protection none for a balloon",
            )
        if config.backing == "hugetlb":
            raise OptionError(
                "a balloon with the hugetlb backing: the guest gives pages of 4 KiB, and these have 2 MiB",
                "balloon",
                "backing",
                hint="use --backing thp for huge pages that can be taken apart",
            )
        if not 0 <= self.size <= config.memory:
            raise OptionError(
                f"a balloon of {self.size:#x} bytes: the guest has {config.memory:#x}",
                "balloon",
                "mem",
                hint="name what the guest is to give up, not what it is to keep",
            )
