# SPDX-License-Identifier: Apache-2.0
"""A disk, from a raw image or a block device: ``--disk``."""

from __future__ import annotations

import argparse
import os

from pyvmm.devices import rates
from pyvmm.devices.kind import DeviceKind, DeviceSpec
from pyvmm.errors import OptionError, UsageError
from pyvmm.syntax.option import SEVERAL, Option
from pyvmm.syntax.parts import Parts
from pyvmm.syntax.paths import OutputPath
from pyvmm.syntax.values import parse_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from pyvmm.devices.kind import Context, Guest
    from pyvmm.devices.virtio.blk import VirtioBlk

MOST_QUEUES: Final = 16
BLOCKS: Final = (512, 1024, 2048, 4096)
"""Sizes that guests with pages of any size take."""


class Disk(DeviceSpec):
    """A raw image or a block device at ``path``; ``queues`` are 1 to 16, ``serial`` has 20 bytes at most.

    ``block`` is the bytes of a logical block, 512 to 4096; 0 for the device's own, which of a file are 512. ``bytes``
    and ``ops`` are what it may move and carry out in a second, 0 for any number: see :mod:`pyvmm.devices.virtio.limit`.
    All devices that are made of one specification share them.
    """

    def __init__(
        self,
        path: str,
        read_only: bool = False,
        queues: int = 1,
        serial: str = "",
        block: int = 0,
        bytes: int = 0,
        ops: int = 0,
    ) -> None:
        """Raise UsageError for invalid values."""
        if not 1 <= queues <= MOST_QUEUES:
            raise OptionError(f"disk {path!r} with {queues} queues: it can have 1 to {MOST_QUEUES}", "disk.queues")
        if serial:
            _check_serial(path, serial)
        if block and block not in BLOCKS:
            raise OptionError(
                f"disk {path!r} with blocks of {block} bytes: they can have {', '.join(map(str, BLOCKS))}", "disk.block"
            )
        self.path, self.read_only, self.queues, self.serial = path, read_only, queues, serial
        self.block, self.rates = block, rates.Rates(bytes, ops)
        self.rates.check(f"disk {path!r}", "disk", "requests")

    def check(self, guest: Guest) -> None:
        """Raise UsageError for a file that two of the guest's disks use, one of them writable."""
        disks = [disk for disk in guest.devices if isinstance(disk, Disk)]
        if self is not disks[0]:  # one disk checks all: resolving a path takes one system call for each part
            return
        files: dict[str, list[Disk]] = {}
        for disk in disks:
            files.setdefault(os.path.realpath(disk.path), []).append(disk)
        for same in files.values():
            if len(same) > 1 and not all(disk.read_only for disk in same):
                raise OptionError(
                    f"disk {same[0].path!r} is given {len(same)} times, but the guest may write to it",
                    *(f"disk[{number}]" for number, disk in enumerate(disks) if disk in same),
                    hint="copy the file, or add ,ro to each disk",
                )

    def check_restored(self, snapshot: str) -> None:
        """Raise UsageError for a disk that was moved: the guest relies on its contents."""
        if not os.path.exists(self.path):
            raise UsageError(
                f"disk {self.path!r} of the guest in {snapshot} is missing",
                hint="restore it with its contents at the time of the snapshot",
            )

    def make(self, context: Context) -> VirtioBlk:
        """Open the disk, and lock it unless this is only a plan."""
        from pyvmm.devices.virtio.blk import VirtioBlk
        from pyvmm.devices.virtio.disk import DiskFile

        file = DiskFile(self.path, read_only=self.read_only, lock=not context.planned, block=self.block)
        return VirtioBlk(
            file,
            queues=self.queues,
            serial=self.serial,
            private=context.private,
            pool=context.pool,
            limit=self.rates.limit(),
        )


def _check_serial(path: str, serial: str) -> None:
    from pyvmm.devices.virtio.disk import SERIAL_SIZE

    if len(serial.encode()) > SERIAL_SIZE:
        raise OptionError(f"disk {path!r}: serial {serial!r} has more than {SERIAL_SIZE} bytes", "disk.serial")


def _check(text: str, values: dict[str, Any]) -> dict[str, Any]:
    if "path" not in values:
        raise argparse.ArgumentTypeError(f"{text!r} names no file; use for example disk.img,ro")
    return values if values.get("ro") else {**values, "path": OutputPath(values["path"])}


def _reaches(text: str) -> str:
    parts = PARTS(text)
    return f"{str(parts['path'])!r} to read{'' if parts.get('ro') else ' and write'}"


PARTS = Parts(
    {"path": str, "ro": None, "queues": parse_count, "serial": str, "block": parse_count, **rates.PARTS},
    main="path",
    check=_check,
)
KIND = DeviceKind(
    Option(
        "-d",
        "--disk",
        group="devices",
        takes=SEVERAL,
        metavar=f"PATH[,ro][,queues=N][,serial=TEXT][,block=BYTES]{rates.METAVAR}",
        type=PARTS,
        path=PARTS.absolute("path"),
        reaches=_reaches,
        help="a disk, from a raw image or a block device; may be repeated: the guest's vda, vdb and so on. "
        f"block=4096 gives it logical blocks of that size, as images of such disks need. {rates.HELP}",
    ),
    lambda parts, _around: Disk(
        parts["path"],
        parts.get("ro", False),
        parts.get("queues", 1),
        parts.get("serial", ""),
        parts.get("block", 0),
        parts.get("bytes", 0),
        parts.get("ops", 0),
    ),
)
