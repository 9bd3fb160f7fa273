# SPDX-License-Identifier: Apache-2.0
"""A machine in a file: everything an unprotected guest needs to go on, and how it goes on from there.

    byte 0          magic, format version, size of the description, size of the file, SHA-256 of the description
    byte 4096       the description: JSON, with registers, devices, and where in the file which memory is
    page by page    guest memory; what the guest never wrote, or what is zeros, is a hole in the file

:mod:`pyvmm.machine.saving` writes one. A :class:`Snapshot` is one that has been opened and found whole, and a
:class:`~pyvmm.machine.start.Start`: it makes a machine that has just been built the one it was saved of. Guest memory
comes in page by page as it is touched, through userfaultfd, where this process may have one. Elsewhere, and where there
is a balloon, all of it is loaded first. The file must stay as it is while such a guest runs.

The guest's counters go on from where they stood: a guest sees of the time between only what its devices tell, and what
passes between reading and setting them. A protected guest cannot be saved: the host may not read its memory, and under
pkvm the hypervisor lets nobody set the clock.
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
VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sI4xQQ32s")
DESCRIPTION: Final = 4096
"""Where in the file it is."""
_MOST: Final = 1 << 28
"""Bytes of a description that anyone would have written."""
CHUNK: Final = 1 << 20
"""Bytes of memory read or written at once."""


def header(description: bytes, size: int) -> bytes:
    """Return what a file of ``size`` bytes with such a description starts with."""
    return _HEADER.pack(MAGIC, VERSION, len(description), size, hashlib.sha256(description).digest())


def facts(machine: Built) -> dict[str, Any]:
    """Return what must be the same of a machine that is saved and the one that goes on."""
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
    """A snapshot's file, open and whole. The machine that starts with it closes it; without one it is a context."""

    kind = "snapshot"

    def __init__(self, path: str) -> None:
        """Open it. Raises UsageError for what is none, of another version, damaged, or cut short."""
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
        """What was given to :func:`save`."""
        return str(self.description["options"])

    def _read(self) -> dict[str, Any]:
        head = os.pread(self._fd, _HEADER.size, 0)
        if len(head) < _HEADER.size or not head.startswith(MAGIC):
            raise UsageError(f"{self.path} is no snapshot of a machine", hint="pyvmm ctl snapshot FILE writes one")
        _, version, size, end, digest = _HEADER.unpack(head)
        if version != VERSION:
            raise UsageError(
                f"{self.path} is a snapshot of format {version}, this pyvmm reads format {VERSION}",
                hint="restore it with the pyvmm that wrote it",
            )
        there = os.fstat(self._fd).st_size
        if there != end:
            raise UsageError(f"{self.path} is damaged: it should have {end} bytes, and has {there}")
        text = os.pread(self._fd, min(size, _MOST), DESCRIPTION)
        if hashlib.sha256(text).digest() != digest:
            raise UsageError(f"{self.path} is damaged: its description is not what was written")
        description: dict[str, Any] = json.loads(text)
        return description

    @property
    def lazy(self) -> bool:
        """Whether pages of guest memory come from the file when they are touched."""
        return bool(self.served)

    def prepare(self, config: MachineConfig) -> None:
        """Raise UsageError for a device that is not what its guest knows, such as a disk that is not where it was."""
        for spec in config.devices:
            spec.check_restored(self.path)

    def enter(self, machine: Built) -> Entry:
        """Make ``machine`` the one that was saved. Memory that cannot be had later fails it, in a thread of this.

        Raises UsageError where the machine is another one, HostError where this host cannot go on with it.
        """
        ours, theirs = facts(machine), self.description["machine"]
        for name, value in ours.items():
            if theirs[name] != value:
                raise UsageError(
                    f"{self.path} is of a machine with {name} {theirs[name]}, and this one has {value}",
                    hint="leave such options out: a snapshot brings its own",
                )
        for slot, region in zip(machine.memory.slots, self.description["memory"], strict=True):
            self._restore_memory(machine, slot, region["offset"])
        saved = self.description["vcpus"]
        for vcpu, each in zip(machine.vcpus, saved, strict=True):
            state.load_vcpu(vcpu, each)
        if (machine.gic is None) != (self.description["gic"] is None):
            raise HostError(f"{self.path} and this host disagree on there being an interrupt controller")
        if machine.gic is not None:
            machine.gic.load(self.description["gic"])
        for placed, each in zip(machine.bus.placed, self.description["devices"], strict=True):
            placed.device.load(each)
        state.load_clock(machine.vcpus[0], saved[0])
        return Entry(Gpa(machine.vcpus[0].pc), Gpa(0), b"", ())

    def _restore_memory(self, machine: Built, slot: Slot, offset: int) -> None:
        # What a balloon gives back is zeros when it is touched again, and not what was saved.
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
        """Serve memory no longer, and close the file. Idempotent. No vCPU may run, and the memory is still mapped."""
        while self.served:
            self.served.pop().close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
