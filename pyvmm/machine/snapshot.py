# SPDX-License-Identifier: Apache-2.0
"""A machine in a file: everything an unprotected guest needs to go on, written while it stands still.

    byte 0          magic, format version, size of the description, size of the file, SHA-256 of the description
    byte 4096       the description: JSON, with registers, devices, and where in the file which memory is
    page by page    guest memory; what the guest never wrote, or what is zeros, is a hole in the file

:func:`save` writes one, by way of another name, so that there is never half a snapshot. A :class:`Snapshot` is one that
has been opened and found whole; :meth:`Snapshot.restore` makes a machine that has just been built the one it was saved
of. Its memory comes in page by page as it is touched, through userfaultfd, where this process may have one; elsewhere,
and where there is a balloon, all of it is loaded first. The file must stay as it is while such a guest runs.

The guest's counters go on from where they stood: a guest sees of the time between only what its devices tell, and what
passes between reading and setting them. A protected guest cannot be saved: the host may not read its memory, and under
pkvm the hypervisor lets nobody set the clock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Self

from pyvmm import __version__
from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, PyvmmError, UsageError, hex_
from pyvmm.kvm import libc
from pyvmm.log import get_logger
from pyvmm.machine import state
from pyvmm.machine.devices import Disk
from pyvmm.memory import mman
from pyvmm.memory.address import PAGE_SIZE
from pyvmm.memory.backing import Memfd
from pyvmm.memory.mman import MappingError
from pyvmm.memory.source_server import SourceServer
from pyvmm.memory.userfault import Userfault
from pyvmm.protection import Protection
from pyvmm.uapi.mman import MAP_SHARED, PROT_NONE, PROT_READ

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.machine.config import MachineConfig
    from pyvmm.machine.machine import Machine
    from pyvmm.memory.slots import Slot

log = get_logger("snapshot")

MAGIC: Final = b"PYVMMSNP"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sI4xQQ32s")
_DESCRIPTION: Final = 4096
_MOST: Final = 1 << 28
"""Bytes of a description that anyone would have written."""
_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK)


def facts(machine: Machine) -> dict[str, Any]:
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


# ---- saving ------------------------------------------------------------------------------------------------------


def save(machine: Machine, path: str, *, options: str = "") -> dict[str, Any]:
    """Write ``machine``, which runs or is paused, to ``path``; it stands still meanwhile, and goes on afterwards.

    ``options`` are kept with it for who restores it. Returns {"bytes", "pages"}: the file's size, and pages of guest
    memory in it. UsageError for a machine that cannot be saved, with the reason; PyvmmError where the file cannot be.
    """
    _refuse(machine)
    machine.pause()
    try:
        if machine.ended_ns:
            raise PyvmmError("the run has ended: there is nothing to save")
        description = {"pyvmm": __version__, "options": options, "machine": facts(machine), **_state(machine)}
        young = f"{path}.new"
        try:
            with open(os.open(young, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                pages = _write(file.fileno(), machine, description)
                size = os.fstat(file.fileno()).st_size
            os.rename(young, path)
        except OSError as error:
            raise PyvmmError(f"{path!r} cannot be written: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(young)
        return {"bytes": size, "pages": pages}
    finally:
        machine.resume()


def _refuse(machine: Machine) -> None:
    match machine.config.protection:
        case Protection.PKVM:
            raise UsageError(
                "a protected guest cannot be saved: the hypervisor keeps its memory from the host, and reading it all "
                "the same would destroy it",
                hint="run it with --protection none, where a snapshot is possible",
            )
        case Protection.EMULATED:
            raise UsageError(
                "a guest of the emulated protection cannot be saved: its private memory is closed to the host, as it "
                "would be under pkvm",
                hint="run it with --protection none, where a snapshot is possible",
            )
    for slot in machine.memory.slots:
        if not slot.backing.host_access:
            raise UsageError(
                f"the {slot} cannot be saved: the host cannot read a {slot.backing.kind}",
                hint="run the guest with another --backing",
            )


def _state(machine: Machine) -> dict[str, Any]:
    """Return what is not memory; some of it is written to memory by the kernel."""
    for native in machine.natives:
        if error := lib.pv_settle(native):
            raise PyvmmError(f"vCPU {native.index} cannot finish its exit: KVM_RUN fails with {os.strerror(error)}")
    gic = machine.gic
    # Devices first: one that hands a request back before it is saved interrupts the guest.
    devices = [placed.device.save() for placed in machine.bus.placed]
    return {
        "devices": devices,
        "gic": None if gic is None else state.save_gic(gic.device, gic.its, len(machine.vcpus)),
        "vcpus": [state.save_vcpu(vcpu) for vcpu in machine.vcpus],
    }


def _write(fd: int, machine: Machine, description: dict[str, Any]) -> int:
    """Write the whole file; returns pages of memory in it."""
    # Where memory begins depends on the description's size, which depends on that: room for any number.
    regions = [{"gpa": slot.gpa, "size": slot.size, "offset": 1 << 62} for slot in machine.memory.slots]
    description["memory"] = regions
    end = _up(_DESCRIPTION + len(json.dumps(description)))
    for region in regions:
        region["offset"] = end
        end += region["size"]
    text = json.dumps(description).encode()
    _put(fd, text, _DESCRIPTION)
    pages = sum(
        _write_slot(fd, machine, slot, region["offset"])
        for slot, region in zip(machine.memory.slots, regions, strict=True)
    )
    os.ftruncate(fd, end)
    # The last to be written: what has no header is no snapshot.
    _put(fd, _HEADER.pack(MAGIC, VERSION, len(text), end, hashlib.sha256(text).digest()), 0)
    return pages


def _write_slot(fd: int, machine: Machine, slot: Slot, offset: int) -> int:
    pages = 0
    for start, end in _data(slot, whole=machine.restored_from is not None):
        for at in range(start, end, _CHUNK):
            data = machine.memory.read(slot.gpa + at, min(_CHUNK, end - at))
            for first, last in _runs(data):
                _put(fd, memoryview(data)[first:last], offset + at + first)
                pages += (last - first) // PAGE_SIZE
    return pages


def _data(slot: Slot, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Yield the ranges of ``slot`` that may hold something; ``whole``: its file does not say, pages may be to come."""
    backing = slot.backing
    if whole or not isinstance(backing, Memfd) or backing.hugetlb:
        yield 0, slot.size
        return
    at, end = slot.offset, slot.offset + slot.size
    while at < end:
        try:
            start = os.lseek(backing.fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but holes
        at = min(os.lseek(backing.fd, start, os.SEEK_HOLE), end)
        if start < end:
            yield start - slot.offset, at - slot.offset


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the ranges of pages of ``data`` that are not all zeros."""
    if data == _ZEROS[: len(data)]:
        return
    zero, first = _ZEROS[:PAGE_SIZE], None
    for at in range(0, len(data), PAGE_SIZE):
        if data[at : at + PAGE_SIZE] != zero:
            first = at if first is None else first
        elif first is not None:
            yield first, at
            first = None
    if first is not None:
        yield first, len(data)


def _put(fd: int, data: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _up(value: int) -> int:
    return (value + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE


# ---- restoring ---------------------------------------------------------------------------------------------------


class Snapshot:
    """A snapshot's file, open and whole. Close it, or use it as a context, when what was restored of it is closed."""

    def __init__(self, path: str) -> None:
        """Open it. Raises UsageError for what is none, of another version, damaged, or cut short."""
        self.path = path
        self.served: list[_Lazy] = []
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
        text = os.pread(self._fd, min(size, _MOST), _DESCRIPTION)
        if hashlib.sha256(text).digest() != digest:
            raise UsageError(f"{self.path} is damaged: its description is not what was written")
        description: dict[str, Any] = json.loads(text)
        return description

    def require_disks(self, config: MachineConfig) -> None:
        """Raise UsageError for a disk that is not where it was: its guest goes on with what it knows to be on that."""
        for spec in config.devices:
            if isinstance(spec, Disk) and not os.path.exists(spec.path):
                raise UsageError(
                    f"disk {spec.path!r}, which the guest of {self.path} had, is not there",
                    hint="put it back as it was when the guest was saved; an empty one will not do",
                )

    def restore(self, machine: Machine, failed: Callable[[PyvmmError], None]) -> None:
        """Make ``machine``, built and not run, the one that was saved.

        ``failed`` hears of memory that cannot be had later, in a thread of this. Raises UsageError where the machine is
        another one, HostError where this host cannot go on with it.
        """
        ours, theirs = facts(machine), self.description["machine"]
        for name, value in ours.items():
            if theirs[name] != value:
                raise UsageError(
                    f"{self.path} is of a machine with {name} {theirs[name]}, and this one has {value}",
                    hint="leave such options out: a snapshot brings its own",
                )
        for slot, region in zip(machine.memory.slots, self.description["memory"], strict=True):
            self._restore_memory(machine, slot, region["offset"], failed)
        saved = self.description["vcpus"]
        for vcpu, each in zip(machine.vcpus, saved, strict=True):
            state.load_vcpu(vcpu, each)
        if (machine.gic is None) != (self.description["gic"] is None):
            raise HostError(f"{self.path} and this host disagree on there being an interrupt controller")
        if machine.gic is not None:
            state.load_gic(machine.gic.device, machine.gic.its, self.description["gic"])
        for placed, each in zip(machine.bus.placed, self.description["devices"], strict=True):
            placed.device.load(each)
        state.load_clock(machine.vcpus[0], saved[0])

    def _restore_memory(self, machine: Machine, slot: Slot, offset: int, failed: Callable[[PyvmmError], None]) -> None:
        lazy = None
        # What a balloon gives back is zeros when it is touched again, and not what was saved.
        balloon = any(each.get("device") == "balloon" for each in self.description["devices"])
        if slot.backing.guest_memfd is None and not balloon:
            try:
                lazy = _Lazy(self._fd, offset, slot, failed)
            except (HostError, MappingError) as error:
                log.info("restored_at_once", reason=error.message)
        if lazy is not None:
            self.served.append(lazy)
            return
        at, end = offset, offset + slot.size
        while (data := self._next_data(at, end)) is not None:
            start, at = data
            for piece in range(start, at, _CHUNK):
                chunk = os.pread(self._fd, min(_CHUNK, at - piece), piece)
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


class _Lazy:
    """A slot's memory, page by page from the file: a mapping of it, a userfaultfd and the thread that serves it."""

    def __init__(self, fd: int, offset: int, slot: Slot, failed: Callable[[PyvmmError], None]) -> None:
        self._slot = slot
        self._tell = failed
        self._giving_up: threading.Thread | None = None
        with contextlib.ExitStack() as half:
            self._userfault = half.enter_context(Userfault.open())
            self._userfault.register(slot.hva, slot.size, missing=True)
            self._address, code = libc.mmap(slot.size, PROT_READ, MAP_SHARED, fd, offset)
            if code:
                raise MappingError("mmap", f"size={slot.size:#x}, offset={offset:#x}", code)
            half.callback(libc.munmap, self._address, slot.size)
            source = memoryview(ffi.buffer(ffi.cast("uint8_t *", self._address), slot.size))
            self._server = SourceServer(self._userfault, slot.hva, source, self._failed)
            log.info("restored_lazily", gpa=hex_(slot.gpa), size=slot.size)
            half.pop_all()

    def _failed(self, error: PyvmmError) -> None:
        self._tell(
            PyvmmError(
                f"a page of the snapshot cannot be had any more: {error.message}",
                hint="was its file changed, or cut, while the guest ran?",
            )
        )
        self._giving_up = threading.Thread(target=self._give_up, name="pyvmm-restore", daemon=True)
        self._giving_up.start()

    def _give_up(self) -> None:
        # Whoever waits must not find zeros, and write them to a disk: nobody finds anything any more.
        mman.protect(self._slot.hva, self._slot.size, PROT_NONE)
        self._userfault.close()

    def close(self) -> None:
        """Serve no longer. Idempotent."""
        self._userfault.close()
        if self._giving_up is not None:
            self._giving_up.join()
        address, self._address = self._address, 0
        if address:
            libc.munmap(address, self._slot.size)
