# SPDX-License-Identifier: Apache-2.0
"""io_uring with one fixed buffer: one read into, or write from, a registered page.

The part of include/uapi/linux/io_uring.h that one request needs. Owns the ring while it is open.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct

from pyvmm.experiment.host.syscalls import (
    NR_IO_URING_ENTER,
    NR_IO_URING_REGISTER,
    NR_IO_URING_SETUP,
    Answer,
    Iovec,
    call,
)
from pyvmm.pages import HOST_PAGE

_PARAMS = 120
_OFF_SQ_RING, _OFF_SQES = 0, 0x1000_0000
_REGISTER_BUFFERS = 0
_ENTER_GETEVENTS = 1
_READ_FIXED, _WRITE_FIXED = 4, 5
_FEATURE_SINGLE_MMAP = 1


class Ring:
    """An io_uring of one entry. A context manager. Raises OSError if the kernel refuses."""

    def __init__(self) -> None:
        params = ctypes.create_string_buffer(_PARAMS)
        answer = call(NR_IO_URING_SETUP, 1, ctypes.byref(params))
        if not answer.ok:
            raise OSError(answer.errno, f"io_uring_setup: {os.strerror(answer.errno)}")
        self.fd = answer.result
        sq_entries, cq_entries, _, _, _, features = struct.unpack_from("<6I", params, 0)
        if not features & _FEATURE_SINGLE_MMAP:
            os.close(self.fd)
            raise OSError(38, "io_uring of this kernel has two rings to map")
        self._sq = struct.unpack_from("<10I", params, 40)
        self._cq = struct.unpack_from("<10I", params, 80)
        size = max(self._sq[6] + 4 * sq_entries, self._cq[5] + 16 * cq_entries)
        self._ring = mmap.mmap(self.fd, size, mmap.MAP_SHARED, offset=_OFF_SQ_RING)
        self._sqes = mmap.mmap(self.fd, 64 * sq_entries, mmap.MAP_SHARED, offset=_OFF_SQES)

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BufferError):
            self._ring.close()
            self._sqes.close()
        os.close(self.fd)

    def register(self, address: int) -> Answer:
        """Register the page at ``address`` as fixed buffer 0: the kernel pins it for as long as the ring lives."""
        vector = Iovec(address, HOST_PAGE)
        return call(NR_IO_URING_REGISTER, self.fd, _REGISTER_BUFFERS, ctypes.byref(vector), 1)

    def transfer(self, fd: int, address: int, *, write: bool) -> Answer:
        """Read from ``fd`` into the fixed buffer, or write from it, and wait for the completion."""
        operation = _WRITE_FIXED if write else _READ_FIXED
        entry = struct.pack("<BBHiQQIIQHHi", operation, 0, 0, fd, 0, address, HOST_PAGE, 0, 1, 0, 0, 0)
        self._sqes[: len(entry)] = entry
        tail_at, mask_at, array_at = self._sq[1], self._sq[2], self._sq[6]
        (tail,) = struct.unpack_from("<I", self._ring, tail_at)
        (mask,) = struct.unpack_from("<I", self._ring, mask_at)
        struct.pack_into("<I", self._ring, array_at + 4 * (tail & mask), 0)
        struct.pack_into("<I", self._ring, tail_at, tail + 1)
        entered = call(NR_IO_URING_ENTER, self.fd, 1, 1, _ENTER_GETEVENTS, 0, 0)
        if not entered.ok:
            return entered
        head_at, cqes_at = self._cq[0], self._cq[5]
        (head,) = struct.unpack_from("<I", self._ring, head_at)
        (mask,) = struct.unpack_from("<I", self._ring, self._cq[2])
        _, result, _ = struct.unpack_from("<QiI", self._ring, cqes_at + 16 * (head & mask))
        struct.pack_into("<I", self._ring, head_at, head + 1)
        return Answer(result, -result if result < 0 else 0)


def register(address: int) -> Answer:
    """Register a page as the fixed buffer of a ring, and close the ring."""
    try:
        with Ring() as ring:
            return ring.register(address)
    except OSError as error:
        return Answer(-1, error.errno or 0)


def write_fixed(address: int) -> Answer:
    """Register a page and write from it into a pipe. Returns the bytes that arrived."""
    return _through_a_pipe(address, None)


def read_fixed(address: int, data: bytes) -> Answer:
    """Register a page and read ``data`` into it from a pipe."""
    return _through_a_pipe(address, data)


def _through_a_pipe(address: int, data: bytes | None) -> Answer:
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        with Ring() as ring:
            registered = ring.register(address)
            if not registered.ok:
                return registered
            if data is not None:
                os.write(write, data)
                return ring.transfer(read, address, write=False)
            answer = ring.transfer(write, address, write=True)
            return Answer(answer.result, answer.errno, os.read(read, HOST_PAGE)) if answer.ok else answer
    except OSError as error:
        return Answer(-1, error.errno or 0)
    finally:
        os.close(read)
        os.close(write)
