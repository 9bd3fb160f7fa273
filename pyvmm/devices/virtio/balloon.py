# SPDX-License-Identifier: Apache-2.0
"""The balloon device (virtio 1.2, 5.5): return unused guest memory to the host.

The host sets the balloon's target size (:meth:`VirtioBalloon.aim`). The guest names pages, which are punched out of
their backing. To take a page back, the guest accesses it and gets a page of zeros. With free page reporting the guest
also names free memory. Owns its worker. Where the host's pages are larger than the balloon's 4 KiB, balloon_pages keeps
which parts of them were named.

It is for guests whose memory the host may access. Unlike other drivers, Linux's balloon driver does not share its rings
(it clears ACCESS_PLATFORM, virtballoon_validate in drivers/virtio/virtio_balloon.c).

=======================================  ==========================================================================
what a hostile guest may do              what happens
=======================================  ==========================================================================
name addresses outside of RAM            ignored, counted
name a page twice, or one in use         the guest's page becomes zero each time
name its own rings                       ignored
name pages without end                   ``_BATCH`` requests at a time, each of at most ``MOST`` pages
=======================================  ==========================================================================
"""

from __future__ import annotations

import os
import struct

from pyvmm.devices.virtio.balloon_pages import PARTS, NamedPages
from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue
from pyvmm.devices.virtio.worker import WorkerDevice
from pyvmm.errors import PyvmmError, UsageError, hex_
from pyvmm.memory.address import align_down, align_up
from pyvmm.pages import GUEST_PAGE
from pyvmm.typed import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Final

F_MUST_TELL_HOST: Final = 1 << 0
F_DEFLATE_ON_OOM: Final = 1 << 2
F_REPORTING: Final = 1 << 5
INFLATE, DEFLATE = 0, 1
MOST: Final = 4096
"""Pages one request may name; Linux names 256."""
_BATCH: Final = 32
_CONFIG: Final = struct.Struct("<IIII")
_ACTUAL: Final = 4
"""The offset of ``actual`` in the configuration space: the number of pages that the guest reports."""


class Punchable(Protocol):
    """The interface of guest memory that a balloon needs."""

    def contains(self, gpa: int, size: int = 1) -> bool:
        """Whether all of a range is in slots."""
        ...

    def punch(self, gpa: int, size: int) -> None:
        """Drop whole pages from their backing."""
        ...


class VirtioBalloon(WorkerDevice):
    """A balloon in RAM ``[ram.start, ram.stop)`` of ``memory``, with a target of ``size`` bytes from the start."""

    device_id = 5
    name = "balloon"
    # Free page reporting is queue 4 in the specification. Linux numbers existing queues without gaps, and uses 2,
    # because there are neither statistics nor hints. So any of the last three queues that the driver sets up is this
    # one.
    queue_sizes = (128,) * 5
    # A page of the host is returned when its last part is named, so no part may be in use again by then.
    features = F_DEFLATE_ON_OOM | F_REPORTING | (F_MUST_TELL_HOST if PARTS > 1 else 0)

    def __init__(self, memory: Punchable, ram: range, size: int = 0) -> None:
        super().__init__()
        self._memory = memory
        self._ram = ram
        self._target = self._pages(size)
        self._actual = bytearray(4)
        self._served: list[tuple[Queue, Callable[[Chain], None]]] = []
        self._rings: frozenset[int] = frozenset()
        self._named = NamedPages()
        self._tells = False
        self.punched = 0
        """Total bytes returned to the host. A page counts each time that it is returned."""
        self.refused = 0
        """Named pages and ranges that were ignored: outside of RAM, or holding the rings."""
        self._worker = self.new_worker()
        self._more = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # -- the host's side

    def aim(self, size: int) -> None:
        """Set the balloon's target to ``size`` bytes, rounded down to pages. Any thread.

        Raises UsageError for more than the guest's memory.
        """
        self._target = self._pages(size)
        self.config_changed()

    def hold(self, size: int | None = None) -> dict[str, int]:
        """Set the target, unless None, and return the balloon's numbers, in bytes."""
        if size is not None:
            self.aim(size)
        return {"target": self.target, "actual": self.actual, "given_back": self.punched}

    @property
    def target(self) -> int:
        """Bytes the balloon should hold."""
        return self._target * GUEST_PAGE

    @property
    def actual(self) -> int:
        """Bytes that the balloon holds, as the guest reports, at most all of RAM."""
        return min(int.from_bytes(self._actual, "little") * GUEST_PAGE, len(self._ram))

    def _pages(self, size: int) -> int:
        if not 0 <= size <= len(self._ram):
            raise UsageError(
                f"a balloon of {size:#x} bytes: the guest has {len(self._ram):#x}",
                hint="SIZE is the memory that the guest gives up, not the rest",
            )
        return size // GUEST_PAGE

    # -- the device

    def config(self) -> bytes:
        """Return the target and the actual number of pages, without hints and poison."""
        return _CONFIG.pack(self._target, int.from_bytes(self._actual, "little"), 0, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        """Take the number of pages that the guest reports."""
        if offset >= _ACTUAL and offset + len(data) <= _ACTUAL + len(self._actual):
            self._actual[offset - _ACTUAL : offset - _ACTUAL + len(data)] = data

    def start(self, queues: Sequence[Queue], features: int) -> None:
        """Serve the guest."""
        self._rings = frozenset(page for queue in queues if queue.ready for page in _ring_pages(queue))
        self._tells = bool(features & F_MUST_TELL_HOST)
        self._named.forget()
        self._served = list(self._roles(queues, features))
        for queue, _ in self._served:
            self._worker.watch(queue, self._serve)
        self._worker.add(self._more, lambda _events: self._go_on())
        self._worker.start(queues)

    def _roles(self, queues: Sequence[Queue], features: int) -> Iterator[tuple[Queue, Callable[[Chain], None]]]:
        if queues[INFLATE].ready:
            yield queues[INFLATE], self._inflate
        if queues[DEFLATE].ready:
            yield queues[DEFLATE], self._deflate
        reporting = next((queue for queue in queues[DEFLATE + 1 :] if queue.ready), None)
        if features & F_REPORTING and reporting is not None:
            yield reporting, self._report

    def stop(self) -> None:
        """Stop serving. After a reset the balloon is empty."""
        super().stop()
        self._served = []
        self._actual[:] = bytes(len(self._actual))

    def save(self) -> dict[str, Any]:
        """Return the sizes."""
        return {"target": self.target, "actual": self.actual}

    def load(self, saved: dict[str, Any]) -> None:
        """Take over the sizes."""
        from pyvmm.schema import NUMBER, check

        check(saved, {"target": NUMBER, "actual": NUMBER}, self.label)
        self._target = self._pages(saved["target"])
        self._actual[:] = self._pages(saved["actual"]).to_bytes(len(self._actual), "little")

    def close(self) -> None:
        """End the thread."""
        super().close()
        os.close(self._more)

    # -- in the worker's thread

    def _go_on(self) -> None:
        os.eventfd_read(self._more)
        self._serve()

    def _serve(self) -> None:
        for queue, handle in self._served:
            for _ in range(_BATCH):
                if queue.leaving:
                    break
                chain = queue.pop()
                if chain is not None:
                    self._handle(chain, handle)
                    queue.push(chain)
                elif queue.arm():
                    break
            else:
                os.eventfd_write(self._more, 1)
            queue.interrupt()

    def _handle(self, chain: Chain, handle: Callable[[Chain], None]) -> None:
        try:
            handle(chain)
        except ChainFault as fault:
            self.complaints.warn("request_failed", reason=str(fault))

    def _inflate(self, chain: Chain) -> None:
        for gpa, size in self._named.give(self._numbers(chain)):
            self._punch(gpa, size)
        if not self._tells:
            # It may use a page before it says so: what it named before is no longer sure.
            self._named.forget()

    def _deflate(self, chain: Chain) -> None:
        if PARTS > 1:
            self._named.take(self._numbers(chain))

    def _numbers(self, chain: Chain) -> list[int]:
        data = chain.read(0, 4 * MOST)
        numbers = struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])
        inside = [number for number in numbers if number * GUEST_PAGE in self._ram]
        self.refused += len(numbers) - len(inside)
        return inside

    def _report(self, chain: Chain) -> None:
        # The chain's segments are the reported ranges. Their contents are not read or written.
        for segment in chain.native.segments[0 : chain.native.count]:
            if segment.writable:
                # Only whole pages of the host: a partly reported page may be in use.
                start = align_up(segment.gpa)
                self._punch(start, align_down(segment.gpa + segment.size) - start)

    def _punch(self, gpa: int, size: int) -> None:
        if size <= 0:
            return
        inside = gpa in self._ram and gpa + size <= self._ram.stop and self._memory.contains(gpa, size)
        if not inside or any(gpa <= page < gpa + size for page in self._rings):
            self.refused += 1
            return
        try:
            self._memory.punch(gpa, size)
            self.punched += size
        except PyvmmError as error:
            self.complaints.warn("not_given_back", gpa=hex_(gpa), size=size, reason=str(error))


def _ring_pages(queue: Queue) -> Iterator[int]:
    """Return the gpas of the pages of a queue's areas, for any kind of ring."""
    native = queue.native
    for gpa, entry in ((native.descriptors, 16), (native.driver, 2), (native.device, 8)):
        yield from range(gpa // GUEST_PAGE * GUEST_PAGE, gpa + entry * queue.size + 6, GUEST_PAGE)
