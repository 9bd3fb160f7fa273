# SPDX-License-Identifier: Apache-2.0
"""Write a paused machine to a snapshot file. :mod:`pyvmm.machine.snapshot` describes the format.

The file is written under a temporary name, so that it is never incomplete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from typing import TYPE_CHECKING, Any, Final

from pyvmm import __version__
from pyvmm._native import lib
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.machine import state
from pyvmm.machine.snapshot import CHUNK, DESCRIPTION, facts, header
from pyvmm.memory.address import align_up
from pyvmm.memory.backing import Memfd
from pyvmm.pages import HOST_PAGE, LARGEST_PAGE
from pyvmm.protection import Protection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.machine.machine import Machine
    from pyvmm.memory.slots import Slot

_ZEROS: Final = bytes(CHUNK)


def save(machine: Machine, path: str, *, options: str = "") -> dict[str, Any]:
    """Write ``machine``, running or paused, to ``path``. It is paused meanwhile, and resumes afterwards.

    ``options`` are stored for the restore. Returns {"bytes", "pages"}: the file's size, and pages of guest memory in
    it. Raises UsageError, with the reason, for a machine that cannot be saved, and PyvmmError if the file cannot be
    written.
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
                "a protected guest cannot be saved: the hypervisor hides its memory from the host, and a read through "
                "the kernel would destroy it",
                hint="run it with --protection none, where a snapshot is possible",
            )
        case Protection.EMULATED:
            raise UsageError(
                "a guest of the emulated protection cannot be saved: the host cannot read its private memory, as "
                "under pkvm",
                hint="run it with --protection none, where a snapshot is possible",
            )
    for slot in machine.memory.slots:
        if not slot.backing.host_access:
            raise UsageError(
                f"the {slot} cannot be saved: the host cannot read a {slot.backing.kind}",
                hint="run the guest with another --backing",
            )


def _state(machine: Machine) -> dict[str, Any]:
    """Return the state besides memory. The kernel writes some of it to guest memory."""
    for native in machine.natives:
        if error := lib.pv_settle(native):
            raise PyvmmError(f"vCPU {native.index} cannot finish its exit: KVM_RUN fails with {os.strerror(error)}")
    # A guest that was paused before has its time from then.
    machine.clock.rewind()
    gic = machine.gic
    # Devices first: a device that completes a request before it is saved interrupts the guest.
    devices = [placed.device.save() for placed in machine.bus.placed]
    return {
        "devices": devices,
        "gic": None if gic is None else gic.save(),
        "vcpus": [state.save_vcpu(vcpu) for vcpu in machine.vcpus],
    }


def _write(fd: int, machine: Machine, description: dict[str, Any]) -> int:
    """Write the whole file; returns pages of memory in it."""
    # The offset of memory depends on the description's size, which depends on that offset. Reserve room for any number.
    regions = [{"gpa": slot.gpa, "size": slot.size, "offset": 1 << 62} for slot in machine.memory.slots]
    description["memory"] = regions
    # Mapped at a restore, also on a host with larger pages.
    end = align_up(DESCRIPTION + len(json.dumps(description)), LARGEST_PAGE)
    for region in regions:
        region["offset"] = end
        end += region["size"]
    text = json.dumps(description).encode()
    _put(fd, text, DESCRIPTION)
    pages = sum(
        _write_slot(fd, machine, slot, region["offset"])
        for slot, region in zip(machine.memory.slots, regions, strict=True)
    )
    os.ftruncate(fd, end)
    # The header is written last: a file without one is not a snapshot.
    _put(fd, header(text, end), 0)
    return pages


def _write_slot(fd: int, machine: Machine, slot: Slot, offset: int) -> int:
    pages = 0
    for start, end in _data(slot, whole=machine.lazy):
        for at in range(start, end, CHUNK):
            data = machine.memory.read(slot.gpa + at, min(CHUNK, end - at))
            for first, last in _runs(data):
                _put(fd, memoryview(data)[first:last], offset + at + first)
                pages += (last - first) // HOST_PAGE
    return pages


def _data(slot: Slot, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Yield the ranges of ``slot`` that may hold data. ``whole``: all of it, because missing pages may still arrive."""
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
            return  # only holes
        at = min(os.lseek(backing.fd, start, os.SEEK_HOLE), end)
        if start < end:
            yield start - slot.offset, at - slot.offset


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the ranges of pages of ``data`` that are not all zeros."""
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


def _put(fd: int, data: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
