# SPDX-License-Identifier: Apache-2.0
"""A virtqueue of the native loop, in memory of two adjacent slots. Pages may be closed to the host."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import TYPE_CHECKING, Any

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio.queue import Queue
from pyvmm.errors import GuestMemoryError
from pyvmm.memory.backing import Memfd
from tests.memory_helper import BASE, build
from tests.twin_virtqueue import Fault, Popped, Rings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE = 4096
HALF = 16 * PAGE
SIZE = 2 * HALF
_libc = ctypes.CDLL(None, use_errno=True)


class Guest:
    """Guest memory as the guest's CPUs see it, closed pages included: ``SIZE`` bytes at ``BASE``."""

    def __init__(self) -> None:
        _, self.memory, _ = build(size=HALF)
        self.memory.add(BASE + HALF, Memfd(HALF))
        self.native = self.memory.native
        self.closed: set[int] = set()

    def read(self, gpa: int, n: int) -> bytes:
        try:
            return self.memory.read(gpa, n)
        except GuestMemoryError as error:
            raise Fault(error.gpa) from None

    def write(self, gpa: int, data: bytes) -> None:
        try:
            self.memory.write(gpa, data)
        except GuestMemoryError as error:
            raise Fault(error.gpa) from None

    @property
    def contents(self) -> bytes:
        return b"".join(os.pread(slot.backing.fd, HALF, 0) for slot in self.memory.slots)

    def load(self, data: bytes) -> None:
        for number, slot in enumerate(self.memory.slots):
            os.pwrite(slot.backing.fd, data[number * HALF :][:HALF], 0)

    def close_pages(self, pages: Iterable[int]) -> None:
        """Make just these pages, by number, unreadable for the host."""
        wanted = set(pages)
        for page in self.closed ^ wanted:
            address = self.memory.hva(BASE + page * PAGE)
            if _libc.mprotect(ctypes.c_void_p(address), PAGE, 0 if page in wanted else 3):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.closed = wanted

    def close(self) -> None:
        self.memory.close()


class Copy:
    """The same memory in a bytearray, for the twin."""

    def __init__(self, data: bytes, closed: Iterable[int] = ()) -> None:
        self.data, self.closed = bytearray(data), set(closed)

    def _check(self, gpa: int, n: int) -> int:
        at = gpa - BASE
        if at < 0 or at + n > SIZE or any(page in self.closed for page in range(at // PAGE, (at + n - 1) // PAGE + 1)):
            raise Fault(gpa)
        return at

    def read(self, gpa: int, n: int) -> bytes:
        at = self._check(gpa, n)
        return bytes(self.data[at : at + n])

    def write(self, gpa: int, data: bytes) -> None:
        at = self._check(gpa, len(data))
        self.data[at : at + len(data)] = data


class Native:
    """The device's end in C, with the twin's interface; ``guest.native`` is the VM."""

    def __init__(self, native_vm: Any, rings: Rings) -> None:
        self.interrupt_line = ffi.new("struct pv_interrupt *", {"fd": -1})
        self.line = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.interrupt_line.fd = self.line
        self.queue = Queue(native_vm, self.interrupt_line, 0, 1 << 15)
        self.queue.setup(rings.size, rings.flags, rings.descriptors, rings.driver, rings.device)
        self.native = self.queue.native
        self._chains: list[tuple[Popped, Any]] = []
        self._keep: list[Any] = []

    @property
    def error(self) -> int:
        return int(self.native.error)

    def chain(self, room: int) -> Any:
        segments = ffi.new("struct pv_segment[]", room)
        self._keep.append(segments)
        return ffi.new("struct pv_chain *", {"room": room, "segments": segments})

    def pop(self, room: int = 256) -> Popped | int:
        """Take a request; return it, 0 or -1."""
        chain = self.chain(room)
        found = lib.pv_queue_pop(self.native, chain)
        if found <= 0:
            return int(found)
        segments = tuple((each.gpa, each.size, bool(each.writable)) for each in chain.segments[0 : chain.count])
        popped = Popped(chain.id, chain.slots, segments)
        self._chains.append((popped, chain))
        return popped

    def push(self, popped: Popped, written: int) -> int:
        number = next(i for i, (each, _) in enumerate(self._chains) if each is popped)
        return int(lib.pv_queue_push(self.native, self._chains.pop(number)[1], written))

    def interrupt(self) -> bool:
        """Return whether the driver is interrupted, and acknowledge the interrupt."""
        lib.pv_queue_interrupt(self.native)
        status, self.interrupt_line.status = self.interrupt_line.status, 0
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.line)
        return bool(status & 1)

    def arm(self) -> int:
        return int(lib.pv_queue_arm(self.native))

    def close(self) -> None:
        self.queue.close()
        os.close(self.line)


@contextlib.contextmanager
def native_queue(native_vm: Any, rings: Rings) -> Iterator[Native]:
    native = Native(native_vm, rings)
    try:
        yield native
    finally:
        native.close()
