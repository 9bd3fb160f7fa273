# SPDX-License-Identifier: Apache-2.0
"""Snapshots: a file with everything an unprotected guest needs to continue, and its restore.

    byte 0          magic, format version, size of the description, size of the file, SHA-256 of the description
    byte 4096       the description: JSON, with registers, devices, and the offsets of memory in the file
    page by page    guest memory; pages that are zero, or that the guest never wrote, are holes in the file
    4 bytes each    checksums of each 4096 bytes of guest memory: CRC-32 from 0 without the final inversion

:mod:`pyvmm.machine.saving` writes one. A :class:`Snapshot` is an open, complete file. It is also a
:class:`~pyvmm.machine.start.Start`: it restores the saved state into a newly built machine. If this process may use
userfaultfd, guest memory is loaded page by page, on first access. Otherwise, and with a balloon, all of it is loaded
first. Memory is checked when it is loaded, so damage ends the run when the guest reaches it, unless :meth:`verify` has
found it before. The file must not change while such a guest runs.

The checksums tell accidents. Whoever can write to the file can make a snapshot that fits them.

The guest's counters continue from their saved values. The guest can see the time in between only through its devices,
apart from the moments between reading and setting the counters. A protected guest cannot be saved: the host may not
read its memory, and under pkvm the hypervisor does not allow setting the clock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import struct
from typing import TYPE_CHECKING, Any, Final, Self

from pyvmm._native import ffi, lib
from pyvmm.errors import HostError, PyvmmError, UsageError, hex_
from pyvmm.log import get_logger
from pyvmm.machine import state
from pyvmm.machine.boot import Entry
from pyvmm.machine.lazy import LazySlot
from pyvmm.memory.address import Gpa
from pyvmm.pages import GUEST_PAGE, HOST_PAGE
from pyvmm.schema import BYTES, HEX, NOTHING, NUMBER, OBJECT, TEXT, Each, Either, SchemaError, check

if TYPE_CHECKING:
    from collections.abc import Iterator

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
SUM_SIZE: Final = 4
"""Bytes of a checksum."""
_DAMAGED: Final = "take another copy of the file, or another snapshot"
_SCHEMA: Final = {
    "pyvmm": TEXT,
    "options": TEXT,
    "machine": {
        "protection": TEXT,
        "cpus": NUMBER,
        "memory": NUMBER,
        "backing": TEXT,
        "slots": [(NUMBER, NUMBER)],
        "devices": [(TEXT, NUMBER, NUMBER)],
    },
    "memory": [{"gpa": NUMBER, "size": NUMBER, "offset": NUMBER, "checksums": NUMBER}],
    "vcpus": [{"mp_state": TEXT, "events": BYTES, "registers": Each(HEX, HEX)}],
    "gic": Either(
        NOTHING,
        {"version": NUMBER, "registers": [(NUMBER, HEX, HEX)], "pending": [(NUMBER, HEX, HEX)], "lines": [NUMBER]},
        {"registers": [(NUMBER, HEX, HEX)], "its": Either(NOTHING, Each(HEX, HEX))},
    ),
    "devices": [OBJECT],
}
"""Of the description. Each device checks its own state when it loads it."""

_Region = dict[str, int]
_INVALID: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
    ctypes.ArgumentError,
)
"""What code raises for values that it does not expect."""


def header(description: bytes, size: int) -> bytes:
    """Return the header of a file of ``size`` bytes with this description."""
    return _HEADER.pack(MAGIC, VERSION, len(description), size, hashlib.sha256(description).digest())


def checksums(data: bytes) -> bytes:
    """Return the checksums of whole pages of 4096 bytes."""
    sums = bytearray(len(data) // GUEST_PAGE * SUM_SIZE)
    lib.pv_checksums(ffi.from_buffer("uint8_t[]", data), len(data) // GUEST_PAGE, ffi.from_buffer("uint32_t[]", sums))
    return bytes(sums)


def runs(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the host's pages of ``data`` that are not all zeros."""
    if data == _ZEROS[: len(data)]:
        return
    zero, first = _ZEROS[:HOST_PAGE], None
    for at in range(0, len(data), HOST_PAGE):
        if data[at : at + HOST_PAGE] != zero:
            first = at if first is None else first
        elif first is not None:
            yield first, at
            first = None
    if first is not None:
        yield first, len(data)


_ZEROS: Final = bytes(CHUNK)


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
            raise self._damaged(f"it should have {end} bytes, but has {there}")
        text = os.pread(self._fd, min(size, _MOST), DESCRIPTION)
        if hashlib.sha256(text).digest() != digest:
            raise self._damaged("its description does not match its checksum")
        try:
            description: dict[str, Any] = json.loads(text)
            check(description, _SCHEMA, "description")
        except SchemaError as error:
            raise self._damaged(str(error)) from None
        except (ValueError, RecursionError):
            raise self._damaged("its description is not JSON") from None
        self._check_places(description, DESCRIPTION + len(text), end)
        return description

    def _check_places(self, description: dict[str, Any], start: int, end: int) -> None:
        """Raise UsageError for regions of memory that are not whole pages, overlap, or leave [start, end)."""
        regions: list[_Region] = description["memory"]
        if [[region["gpa"], region["size"]] for region in regions] != description["machine"]["slots"]:
            raise self._damaged("its regions of memory are not those of its machine")
        places = []
        for region in regions:
            for name, size in (("offset", region["size"]), ("checksums", region["size"] // GUEST_PAGE * SUM_SIZE)):
                if region[name] % GUEST_PAGE or region["size"] % GUEST_PAGE:
                    raise self._damaged(f"the {name} {region[name]} of memory is not a multiple of {GUEST_PAGE}")
                places.append((region[name], region[name] + size))
        for first, last in sorted(places):
            if first < start or last > end:
                raise self._damaged(f"memory at bytes {first} to {last} overlaps other parts, or is not in the file")
            start = last

    def _damaged(self, why: str) -> UsageError:
        return UsageError(f"{self.path} is damaged: {why}", hint=_DAMAGED)

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
        saved, devices = self.description["vcpus"], self.description["devices"]
        if (len(saved), len(devices)) != (len(machine.vcpus), len(machine.bus.placed)):
            raise self._damaged(f"it has the state of {len(saved)} vCPUs and {len(devices)} devices")
        for slot, region in zip(machine.memory.slots, self.description["memory"], strict=True):
            self._restore_memory(machine, slot, region)
        for vcpu, each in zip(machine.vcpus, saved, strict=True):
            with self._loading(vcpu.label):
                state.load_vcpu(vcpu, each)
        if (machine.gic is None) != (self.description["gic"] is None):
            raise HostError(f"only one of {self.path} and this host has an interrupt controller")
        if machine.gic is not None:
            with self._loading("the interrupt controller"):
                machine.gic.load(self.description["gic"])
        for placed, each in zip(machine.bus.placed, devices, strict=True):
            with self._loading(f"device {placed.device.name}"):
                placed.device.load(each)
        state.load_clock(machine.vcpus[0], saved[0])
        return Entry(Gpa(machine.vcpus[0].pc), Gpa(0), b"", ())

    @contextlib.contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        """Say which state is not valid, for an error that tells only a value."""
        try:
            yield
        except PyvmmError:
            raise
        except _INVALID as error:
            name = "" if isinstance(error, SchemaError) else f"{type(error).__name__}: "
            raise self._damaged(f"the state of {what} is not valid: {name}{error}") from error

    def verify(self) -> None:
        """Raise UsageError if any page of guest memory in the file does not match its checksum."""
        for region in self.description["memory"]:
            for _ in self._chunks(region):
                pass

    def _restore_memory(self, machine: Built, slot: Slot, region: _Region) -> None:
        # Pages that a balloon returns must read as zeros, not as the saved contents.
        balloon = any(each.get("device") == "balloon" for each in self.description["devices"])
        if slot.backing.guest_memfd is None and not balloon:
            try:
                self.served.append(LazySlot(self._fd, region["offset"], region["checksums"], slot, machine.failed))
            except HostError as error:
                log.info("restored_at_once", reason=error.message)
            else:
                return
        for at, chunk in self._chunks(region):
            for first, last in runs(chunk):
                machine.memory.write(slot.gpa + at + first, memoryview(chunk)[first:last])

    def _chunks(self, region: _Region) -> Iterator[tuple[int, bytes]]:
        """Yield (offset in the region, contents) of the parts that are not holes. Raises UsageError for damage."""
        for at in range(0, region["size"], CHUNK):
            size = min(CHUNK, region["size"] - at)
            sums = self._bytes(region["checksums"] + at // GUEST_PAGE * SUM_SIZE, size // GUEST_PAGE * SUM_SIZE)
            chunk = self._bytes(region["offset"] + at, size) if self._has_data(region["offset"] + at, size) else b""
            data = ffi.from_buffer("uint8_t[]", chunk or _ZEROS)
            page = lib.pv_first_damaged(data, size // GUEST_PAGE, ffi.from_buffer("uint32_t[]", sums))
            if page < size // GUEST_PAGE:
                gpa = region["gpa"] + at + page * GUEST_PAGE
                raise self._damaged(f"memory at gpa {hex_(gpa)} does not match its checksum")
            if chunk:
                yield at, chunk

    def _bytes(self, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = os.pread(self._fd, size - len(data), offset + len(data))
            except OSError as error:
                raise UsageError(f"snapshot {self.path!r} cannot be read: {error.strerror}") from None
            if not more:
                raise self._damaged(f"it ends before byte {offset + size}")
            data += more
        return data

    def _has_data(self, offset: int, size: int) -> bool:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) < offset + size
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise UsageError(f"snapshot {self.path!r} cannot be read: {error.strerror}") from None
            return False

    def close(self) -> None:
        """Stop serving memory, and close the file. Idempotent. No vCPU may run, and memory must still be mapped."""
        while self.served:
            self.served.pop().close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
