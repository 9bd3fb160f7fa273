# SPDX-License-Identifier: Apache-2.0
"""Write a paused machine to a snapshot file. :mod:`pyvmm.machine.snapshot` describes the format.

The file is on the disk before it gets its name, so it is never incomplete. It has no name while it is written: a
process that is killed then leaves nothing. It has a temporary name where the file system has no O_TMPFILE. Elsewhere it
has one for an instant at the end: no call replaces a named file by one without a name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import TYPE_CHECKING, Any

from pyvmm import __version__
from pyvmm._native import lib
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.machine import state
from pyvmm.machine.snapshot import CHUNK, DESCRIPTION, SUM_SIZE, checksums, facts, header, runs
from pyvmm.memory.address import align_up
from pyvmm.memory.backing import Memfd
from pyvmm.pages import GUEST_PAGE, HOST_PAGE, LARGEST_PAGE
from pyvmm.protection import Protection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.machine.machine import Machine
    from pyvmm.memory.slots import Slot


def save(machine: Machine, path: str, *, options: str = "") -> dict[str, Any]:
    """Write ``machine``, running or paused, to ``path``. It is paused meanwhile, and resumes afterwards.

    ``options`` are stored for the restore. Returns {"bytes", "pages"}: the file's size, and pages of guest memory in
    it. The file and its name are on the disk by then. Raises UsageError, with the reason, for a machine that cannot be
    saved, and for a path that is not a file's. Raises PyvmmError if the file cannot be written.
    """
    _refuse(machine)
    try:
        with _new_file(path) as fd:
            machine.pause()
            try:
                if machine.ended_ns:
                    raise PyvmmError("the run has ended: there is nothing to save")
                description = {"pyvmm": __version__, "options": options, "machine": facts(machine), **_state(machine)}
                pages = _write(fd, machine, description)
            finally:
                machine.resume()
            return {"bytes": os.fstat(fd).st_size, "pages": pages}
    except OSError as error:
        raise PyvmmError(f"{path!r} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _new_file(path: str) -> Iterator[int]:
    """Make a file that replaces the one at ``path`` after this context, and only if no error leaves it."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{path!r} is not a regular file, so no snapshot can replace it")
    directory = os.path.dirname(path) or "."
    # A name that nobody knows before. A file that is there already may be foreign, and its owner could read the guest.
    young = f"{directory}/.pyvmm-snapshot-{os.urandom(8).hex()}"
    fd = _nameless(directory)
    named = fd is None
    if fd is None:
        fd = os.open(young, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield fd
            os.fsync(fd)
            if not named:
                # linkat() replaces no file, so this name is needed for a moment. Python calls link() instead, which
                # follows no link of /proc, unless it is given a descriptor. An absolute path ignores the descriptor.
                os.link(_link(fd), young, src_dir_fd=fd, follow_symlinks=True)
                named = True
        finally:
            os.close(fd)
        os.rename(young, path)
    except BaseException:
        if named:
            with contextlib.suppress(OSError):
                os.unlink(young)
        raise
    _sync_directory(directory)


def _nameless(directory: str) -> int | None:
    """Return the descriptor of a new file without a name, or None where such a file cannot be made and named later."""
    try:
        fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            return None
        raise
    if os.path.exists(_link(fd)):
        return fd
    os.close(fd)
    return None


def _link(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this file system cannot
            raise
    finally:
        os.close(fd)


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
    regions = [
        {"gpa": slot.gpa, "size": slot.size, "offset": 1 << 62, "checksums": 1 << 62} for slot in machine.memory.slots
    ]
    description["memory"] = regions
    end = align_up(DESCRIPTION + len(json.dumps(description)), LARGEST_PAGE)
    for region in regions:
        region["offset"] = end
        end += region["size"]
    for region in regions:
        region["checksums"] = end
        end = align_up(end + region["size"] // GUEST_PAGE * SUM_SIZE, GUEST_PAGE)
    text = json.dumps(description).encode()
    _put(fd, text, DESCRIPTION)
    pages = sum(
        _write_slot(fd, machine, slot, region["offset"], region["checksums"])
        for slot, region in zip(machine.memory.slots, regions, strict=True)
    )
    os.ftruncate(fd, end)
    # The header is written last: a file without one is not a snapshot.
    _put(fd, header(text, end), 0)
    return pages


def _write_slot(fd: int, machine: Machine, slot: Slot, offset: int, sums: int) -> int:
    pages = 0
    for start, end in _data(slot, whole=machine.lazy):
        for at in range(start, end, CHUNK):
            data = machine.memory.read(slot.gpa + at, min(CHUNK, end - at))
            written = pages
            for first, last in runs(data):
                _put(fd, memoryview(data)[first:last], offset + at + first)
                pages += (last - first) // HOST_PAGE
            if pages > written:
                _put(fd, checksums(data), sums + at // GUEST_PAGE * SUM_SIZE)
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


def _put(fd: int, data: bytes | memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
