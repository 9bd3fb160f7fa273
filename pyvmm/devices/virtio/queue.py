# SPDX-License-Identifier: Apache-2.0
"""Virtqueues for devices in Python. Devices in C call native/virtio/virtqueue.c directly.

A :class:`Queue` owns one ``struct pv_queue`` and the eventfd of the guest's kicks. The transport sets it up and marks
it as ready. Between the device's start and stop it belongs to one thread, the device's worker.
"""

from __future__ import annotations

import os

from pyvmm._native import ffi, lib
from pyvmm.errors import PyvmmError, hex_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from pyvmm._native import pv_interrupt, pv_queue, pv_vm

#: Maximum segments of a chain. An indirect table is not limited by the queue's size.
LEAST_ROOM: Final = 256

_INDEX: Final = 0xFFFF
#: A queue's saved positions, and their limits; None: the ring's size.
_POSITION: Final[dict[str, int | None]] = {
    "next": None, "next_wrap": 2, "used": None, "used_wrap": 2, "available": None, "asked": 2,
    "error": lib.PV_QUEUE_ERRORS, "error_gpa": 1 << 64,
}  # fmt: skip
_ERRORS: Final = {
    lib.PV_QUEUE_RING: "one of its rings is not accessible: private, gone, or outside of memory",
    lib.PV_QUEUE_TABLE: "an indirect table is not accessible: private, gone, or outside of memory",
    lib.PV_QUEUE_INDEX: "more is available than the ring has descriptors",
    lib.PV_QUEUE_DESCRIPTOR: "a descriptor's number is beyond the table",
    lib.PV_QUEUE_LOOP: "a chain has more descriptors than the table: it loops",
    lib.PV_QUEUE_SEGMENT: "a descriptor is empty, or ends beyond 2^64",
    lib.PV_QUEUE_ORDER: "a readable descriptor follows a writable one",
    lib.PV_QUEUE_LENGTH: "a chain has 4 GiB or more",
    lib.PV_QUEUE_INDIRECTION: "an indirect table was not negotiated, or is empty, odd, in another, or not the last",
    lib.PV_QUEUE_ROOM: "a chain has more segments than the device takes",
}


class QueueBroken(PyvmmError):
    """The driver violated the protocol, or removed the rings. The queue stops until the device is reset."""


class ChainFault(PyvmmError):
    """A request's bytes at ``gpa`` are not accessible: private, gone, or no memory. Only the request fails."""

    def __init__(self, gpa: int) -> None:
        super().__init__(f"a request names gpa {hex_(gpa)}, which the host may not access, or which is not memory")
        self.gpa = gpa


class Chain:
    """One request, valid until it is pushed. Offsets count from the first readable or writable byte.

    Only :meth:`Queue.pop` makes one: for the native ``queue``, of at most ``room`` segments.
    """

    __slots__ = ("_queue", "_segments", "native")

    def __init__(self, queue: pv_queue, room: int) -> None:
        self._queue = queue
        self._segments = ffi.new("struct pv_segment[]", room)
        self.native = ffi.new("struct pv_chain *", {"room": room, "segments": self._segments})

    @property
    def readable_size(self) -> int:
        """Bytes from the driver."""
        return int(self.native.in_bytes)

    @property
    def writable_size(self) -> int:
        """Bytes to the driver."""
        return int(self.native.out_bytes)

    def read(self, offset: int, size: int) -> bytes:
        """Copy up to ``size`` bytes, fewer if the chain ends. The driver chose its size, so ``size`` must be bounded.

        Raises ChainFault if a page is not accessible.
        """
        size = min(size, max(self.readable_size - offset, 0))
        into = ffi.new("uint8_t[]", size)
        done = lib.pv_chain_read(self._queue, self.native, offset, into, size)
        if done < size:
            raise ChainFault(self._gpa(offset + done, writable=False))
        return bytes(ffi.buffer(into))

    def write(self, offset: int, data: bytes) -> int:
        """Copy ``data``, as much as fits into the chain. Returns the bytes copied. Raises ChainFault."""
        size = min(len(data), max(self.writable_size - offset, 0))
        done = lib.pv_chain_write(self._queue, self.native, offset, data, size)
        if done < size:
            raise ChainFault(self._gpa(offset + done, writable=True))
        return size

    def _gpa(self, offset: int, *, writable: bool) -> int:
        for segment in self._segments[0 : self.native.count]:
            if bool(segment.writable) != writable:
                continue
            if offset < segment.size:
                return int(segment.gpa) + offset
            offset -= segment.size
        raise AssertionError("an offset within the chain is in one of its segments")


class Queue:
    """One virtqueue, the device's number ``index``, of at most ``most`` entries. The transport makes it.

    ``native_vm`` is a ``struct pv_vm *``, ``interrupt`` the device's.
    """

    def __init__(self, native_vm: pv_vm, interrupt: pv_interrupt, index: int, most: int) -> None:
        self.index = index
        self.most = most
        self.ready = False
        self.kicks_in_kernel = False
        """Whether the kernel takes its kicks, without an exit."""
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.native = ffi.new("struct pv_queue *")
        self._keep = (native_vm, interrupt)
        self.native.vm, self.native.interrupt, self.native.kick = native_vm, interrupt, self.kick
        self._spare: list[Chain] = []

    @property
    def size(self) -> int:
        """Entries, while it is ready."""
        return int(self.native.size)

    @property
    def room(self) -> int:
        """The most segments a chain may have."""
        return max(self.size, LEAST_ROOM)

    # -- the transport's

    def setup(self, size: int, flags: int, descriptors: int, driver: int, device: int) -> None:
        """Make it ready, at its start, with ``size`` entries. ``flags`` are of enum pv_queue_flag.

        The gpas ``descriptors``, ``driver`` and ``device`` are its areas, already checked.
        """
        native = self.native
        native.size, native.flags = size, flags
        native.descriptors, native.driver, native.device = descriptors, driver, device
        native.stop = 0
        self._spare = []
        lib.pv_queue_start(native)
        self.ready = True

    def reset(self) -> None:
        """Make it not ready. It is not used afterwards."""
        self.ready = False
        native = self.native
        native.size = native.flags = native.descriptors = native.driver = native.device = 0
        lib.pv_queue_start(native)
        lib.pv_queue_take(native)

    @property
    def held(self) -> int:
        """Entries of requests that were popped and not pushed."""
        native = self.native
        packed = native.flags & lib.PV_QUEUE_PACKED
        return int(native.taken if packed else (native.next - native.used) & _INDEX)

    def save(self) -> dict[str, int]:
        """Return its positions, while it is not served."""
        return {name: int(getattr(self.native, name)) for name in _POSITION}

    def load(self, saved: dict[str, int]) -> None:
        """Restore positions, once set up. Raises ValueError if they are invalid for this size."""
        native = self.native
        end = native.size if native.flags & lib.PV_QUEUE_PACKED else _INDEX + 1
        for name, most in _POSITION.items():
            if not 0 <= saved[name] < (end if most is None else most):
                raise ValueError(f"queue {self.index} cannot have {name} {saved[name]}")
            setattr(native, name, saved[name])

    def close(self) -> None:
        """Close the eventfd; idempotent."""
        self.ready = False
        if self.kick >= 0:
            os.close(self.kick)
            self.kick = self.native.kick = -1

    # -- the device's

    @property
    def leaving(self) -> bool:
        """Whether the server of the queue must return after the current request."""
        return bool(self.native.stop)

    @property
    def problem(self) -> str | None:
        """Why the queue is broken, as text; None if it is not."""
        error = self.native.error
        if error == lib.PV_QUEUE_OK:
            return None
        return f"queue {self.index}: {_ERRORS[error]} (at gpa {hex_(self.native.error_gpa)})"

    def pop(self) -> Chain | None:
        """Return the next request, or None. Raises QueueBroken."""
        chain = self._spare.pop() if self._spare else Chain(self.native, self.room)
        found = lib.pv_queue_pop(self.native, chain.native)
        if found > 0:
            return chain
        self._spare.append(chain)
        self._check(found)
        return None

    def push(self, chain: Chain, written: int = 0) -> None:
        """Return the request ``chain`` to the driver, with ``written`` valid bytes in its writable part.

        Does not interrupt. Raises QueueBroken.
        """
        self._check(lib.pv_queue_push(self.native, chain.native, written))
        self._spare.append(chain)

    def interrupt(self) -> None:
        """After a batch of pushes: interrupt the driver if it requests that. Raises QueueBroken."""
        lib.pv_queue_interrupt(self.native)
        self._check(-1 if self.native.error else 0)

    def arm(self) -> bool:
        """Request kicks. True: sleep until one; False: check the ring again. Raises QueueBroken."""
        armed = lib.pv_queue_arm(self.native)
        self._check(armed)
        return armed > 0

    def wake(self) -> None:
        """Wake the worker as a kick does. Any thread."""
        lib.pv_queue_wake(self.native)

    def take(self) -> None:
        """Clear the kick. Check the ring after this, not before."""
        lib.pv_queue_take(self.native)

    def serve(self, handle: Callable[[Chain], int]) -> None:
        """Answer all requests with ``handle``, which returns the bytes written, until a stop.

        Afterwards the queue is armed, or must be served again when the worker resumes. Raises QueueBroken.
        """
        while not self.leaving:
            chain = self.pop()
            if chain is not None:
                self.push(chain, handle(chain))
                continue
            self.interrupt()
            if self.arm():
                return
        self.interrupt()

    def _check(self, result: int) -> None:
        if result < 0:
            raise QueueBroken(self.problem or f"queue {self.index} is broken")
