# SPDX-License-Identifier: Apache-2.0
"""Snapshots: a file with everything an unprotected guest needs to continue, and its restore.

    byte 0          magic, format version, size of the description, size of the file, SHA-256 of the description
    byte 4096       the description: JSON, with registers, devices, and the offsets of memory in the file
    page by page    guest memory; pages that are zero, or that the guest never wrote, are holes in the file

:mod:`pyvmm.machine.saving` writes one. A :class:`Snapshot` is an open, complete file. It is also a
:class:`~pyvmm.machine.start.Start`: it restores the saved state into a newly built machine. If this process may use
userfaultfd, guest memory is loaded page by page, on first access. Otherwise, and with a balloon, all of it is loaded
first. The file must not change while such a guest runs.

The guest's counters continue from their saved values. The guest can see the time in between only through its devices,
apart from the moments between reading and setting the counters. A protected guest cannot be saved: the host may not
read its memory, and under pkvm the hypervisor does not allow setting the clock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from typing import TYPE_CHECKING, Any, Final, Self

from pyvmm.errors import HostError, UsageError
from pyvmm.log import get_logger
from pyvmm.machine import state
from pyvmm.machine.boot import Entry
from pyvmm.machine.lazy import LazySlot
from pyvmm.memory.address import Gpa
from pyvmm.memory.mman import MappingError

if TYPE_CHECKING:
    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.start import Built
    from pyvmm.memory.slots import Slot

log = get_logger("snapshot")

MAGIC: Final = b"PYVMMSNP"
VERSION: Final = 2
_HEADER: Final = struct.Struct("<8sI4xQQ32s")
DESCRIPTION: Final = 4096
"""Its offset in the file."""
_MOST: Final = 1 << 28
"""Maximum bytes of a description."""
CHUNK: Final = 1 << 20
"""Bytes of memory to read or write at once."""


def header(description: bytes, size: int) -> bytes:
    """Return the header of a file of ``size`` bytes with this description."""
    return _HEADER.pack(MAGIC, VERSION, len(description), size, hashlib.sha256(description).digest())


def facts(machine: Built) -> dict[str, Any]:
    """Return the properties that the saved and the restored machine must share."""
    config = machine.config
    return {
        "protection": config.protection.value,
        "cpus": config.cpus,
        "memory": config.memory,
        "backing": config.backing,
        "slots": [[slot.gpa, slot.size] for slot in machine.memory.slots],
        "devices": [[placed.device.name, placed.base, placed.device.size] for placed in machine.bus.placed],
    }


class Snapshot:
    """A snapshot file, open and complete. The machine that starts with it closes it. Otherwise use it as a context."""

    kind = "snapshot"

    def __init__(self, path: str) -> None:
        """Open it. Raises UsageError if it is not a snapshot, has another version, is damaged, or truncated."""
        self.path = path
        self.served: list[LazySlot] = []
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"snapshot {path!r} cannot be opened: {reason}") from None
        try:
            self.description = self._read()
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, OSError):
                raise UsageError(f"snapshot {path!r} cannot be read: {error.strerror}") from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def options(self) -> str:
        """The options that were given to :func:`save`."""
        return str(self.description["options"])

    def _read(self) -> dict[str, Any]:
        head = os.pread(self._fd, _HEADER.size, 0)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise UsageError(f"{self.path} is not a snapshot of a machine", hint="use pyvmm ctl snapshot FILE")
        _, version, size, end, digest = _HEADER.unpack(head)
        if version != VERSION:
            raise UsageError(
                f"{self.path} is a snapshot of format {version}, but this pyvmm reads format {VERSION}",
                hint="restore it with the pyvmm that wrote it",
            )
        there = os.fstat(self._fd).st_size
        if there != end:
            raise UsageError(f"{self.path} is damaged: it should have {end} bytes, but has {there}")
        text = os.pread(self._fd, min(size, _MOST), DESCRIPTION)
        if hashlib.sha256(text).digest() != digest:
            raise UsageError(f"{self.path} is damaged: its description does not match its checksum")
        description: dict[str, Any] = json.loads(text)
        return description

    @property
    def lazy(self) -> bool:
        """Whether guest memory is loaded page by page, on first access."""
        return bool(self.served)

    def prepare(self, config: MachineConfig) -> None:
        """Raise UsageError for a device that differs from the saved one, such as a disk that was moved."""
        for spec in config.devices:
            spec.check_restored(self.path)

    def enter(self, machine: Built) -> Entry:
        """Restore the saved state into ``machine``. If a page cannot be read later, a thread of this fails the machine.

        Raises UsageError if the machine differs from the saved one, HostError if this host cannot continue it.
        """
        ours, theirs = facts(machine), self.description["machine"]
        for name, value in ours.items():
            if theirs[name] != value:
                raise UsageError(
                    f"{self.path} is of a machine with {name} {theirs[name]}, but this one has {value}",
                    hint="drop these options: a snapshot has its own",
                )
        for slot, region in zip(machine.memory.slots, self.description["memory"], strict=True):
            self._restore_memory(machine, slot, region["offset"])
        saved = self.description["vcpus"]
        for vcpu, each in zip(machine.vcpus, saved, strict=True):
            state.load_vcpu(vcpu, each)
        if (machine.gic is None) != (self.description["gic"] is None):
            raise HostError(f"only one of {self.path} and this host has an interrupt controller")
        if machine.gic is not None:
            machine.gic.load(self.description["gic"])
        for placed, each in zip(machine.bus.placed, self.description["devices"], strict=True):
            placed.device.load(each)
        state.load_clock(machine.vcpus[0], saved[0])
        return Entry(Gpa(machine.vcpus[0].pc), Gpa(0), b"", ())

    def _restore_memory(self, machine: Built, slot: Slot, offset: int) -> None:
        # Pages that a balloon returns must read as zeros, not as the saved contents.
        balloon = any(each.get("device") == "balloon" for each in self.description["devices"])
        if slot.backing.guest_memfd is None and not balloon:
            try:
                self.served.append(LazySlot(self._fd, offset, slot, machine.failed))
            except (HostError, MappingError) as error:
                log.info("restored_at_once", reason=error.message)
            else:
                return
        at, end = offset, offset + slot.size
        while (data := self._next_data(at, end)) is not None:
            start, at = data
            for piece in range(start, at, CHUNK):
                chunk = os.pread(self._fd, min(CHUNK, at - piece), piece)
                machine.memory.write(slot.gpa + piece - offset, chunk)

    def _next_data(self, at: int, end: int) -> tuple[int, int] | None:
        if at >= end:
            return None
        try:
            start = os.lseek(self._fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return None
        return (start, min(os.lseek(self._fd, start, os.SEEK_HOLE), end)) if start < end else None

    def close(self) -> None:
        """Stop serving memory, and close the file. Idempotent. No vCPU may run, and memory must still be mapped."""
        while self.served:
            self.served.pop().close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
