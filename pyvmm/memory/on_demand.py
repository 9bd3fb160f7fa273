# SPDX-License-Identifier: Apache-2.0
"""Guest memory on demand: add a slot when the guest accesses an address without one.

An ``OnDemand`` owns nothing: ``Memory`` owns its files. vCPU threads call it, one at a time. Its lock is taken before
the memory's. It is the only way to fill a protected guest's memory lazily, because a protected guest's faults cannot
wait for userfaultfd. An access without a memslot is an MMIO exit, in every protection.

The access is never completed here. The guest repeats it once there is memory (``pv_mmio_retry``). This works for any
width, and for accesses across pages, for which KVM does not report which part is missing. It also works after another
vCPU's access has donated the page, which the host could then not access. Only accesses that KVM can decode exit: plain
loads and stores. Pairs, write-back and instruction fetches give the guest an abort, or the VMM ENOSYS.

Hostile guests: every gpa is looked up in fixed ranges, and there are at most ``limit`` slots. Accesses beyond them get
the external abort of any address without memory.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from pyvmm._native import lib
from pyvmm.errors import PyvmmError, UsageError, hex_
from pyvmm.memory.address import MIB, Gpa, is_aligned, span
from pyvmm.memory.backing import Memfd
from pyvmm.memory.memlock import require_memlock
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu
    from pyvmm.memory.memory import Memory

LIMIT = 1024

Fill: TypeAlias = "Callable[[Gpa, int], bytes | bytearray | memoryview | None]"
"""Returns the initial contents of ``[gpa, gpa + size)``: at most ``size`` bytes, followed by zeros. None: zeros."""


@dataclass(frozen=True, slots=True)
class _Window:
    gpa: int
    size: int
    file: Memfd


class OnDemand:
    """Memory for ``ranges`` of (gpa, size), in slots of ``granule`` bytes. The last slot of a range may be smaller.

    Pass it as the machine's ``unclaimed``, and attach it before the start::

        lazy = OnDemand([(0x2000_0000, 64 << 20)], granule=1 << 16, fill=lambda gpa, size: contents(gpa, size))
        with Machine(config, unclaimed=lazy) as machine:
            lazy.attach(machine.memory)
            machine.run()

    ``fill`` runs in the thread of the waiting vCPU. Other vCPUs may have to wait meanwhile, so it must not wait for
    them. Its exception ends the run. There are at most ``limit`` slots.

    Raises UsageError for ranges that overlap or are not whole pages, for a ``granule`` that is not whole pages, and for
    a ``limit`` below 1.
    """

    def __init__(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        granule: int = 2 * MIB,
        fill: Fill | None = None,
        limit: int = LIMIT,
    ) -> None:
        self.ranges = sorted(ranges)
        self.granule = granule
        self.limit = limit
        """The maximum number of slots."""
        self.slots = 0
        """The number of slots added."""
        self.late = 0
        """Accesses whose slot another vCPU had already added."""
        self.refused = 0
        """Accesses refused because of ``limit``."""
        self._fill = fill
        self._lock = threading.Lock()
        self._memory: Memory | None = None
        self._windows: list[_Window] = []
        self._filled: set[int] = set()
        self._check()

    def attach(self, memory: Memory) -> None:
        """Serve the guest of ``memory``. Call once, before it runs: all of a protected guest's memory must be lockable.

        Raises UsageError if a range overlaps memory or a device, HostError if the memory cannot be locked.
        """
        if self._memory:
            raise UsageError("memory on demand already serves another guest")
        for gpa, size in self.ranges:
            self._check_devices(memory, gpa, size)
        if memory.protection is Protection.PKVM:
            most = min(self.limit * self.granule, sum(size for _, size in self.ranges))
            require_memlock(sum(slot.size for slot in memory.slots) + most)
        windows = []
        for gpa, size in self.ranges:
            # One sparse file per range, not per slot: descriptors are limited.
            file = Memfd(size)
            memory.reserve(gpa, file)
            windows.append(_Window(gpa, size, file))
        self._windows = windows
        self._memory = memory

    def __call__(self, native: pv_vcpu) -> bool:
        """Provide memory for the access of ``native`` (``struct pv_vcpu *``). False if no range has its gpa."""
        memory = self._memory
        if memory is None:
            raise PyvmmError("memory on demand is not attached", hint="call attach(machine.memory) before the start")
        gpa = native.gpa
        number = bisect_right(self.ranges, gpa, key=lambda each: each[0]) - 1
        if number < 0 or gpa - self.ranges[number][0] >= self.ranges[number][1]:
            return False
        with self._lock:
            if memory.contains(gpa):
                self.late += 1
            elif self.slots >= self.limit or not memory.free_slots:
                self.refused += 1
                return False
            else:
                self._provide(memory, self._windows[number], gpa)
        lib.pv_mmio_retry(native)
        return True

    def _provide(self, memory: Memory, window: _Window, gpa: int) -> None:
        offset = (gpa - window.gpa) // self.granule * self.granule
        start, size = Gpa(window.gpa + offset), min(self.granule, window.size - offset)
        # A slot that was removed comes back with its old contents.
        if self._fill and start not in self._filled and (data := self._fill(start, size)):
            if len(data) > size:
                raise UsageError(f"{len(data)} bytes were given to fill {span(start, size)}, of {size} bytes")
            window.file.load(offset, data)
        memory.add(start, window.file, offset=offset, size=size)
        self._filled.add(start)
        self.slots += 1

    def _check(self) -> None:
        if self.granule <= 0 or not is_aligned(self.granule):
            raise UsageError(f"a granule of {self.granule:#x} bytes: use a multiple of {HOST_PAGE:#x}")
        if self.limit < 1:
            raise UsageError(f"memory on demand of at most {self.limit} slots: use at least 1")
        before = 0
        for gpa, size in self.ranges:
            if gpa < 0 or size <= 0 or not (is_aligned(gpa) and is_aligned(size)):
                raise UsageError(f"memory on demand at {gpa:#x}, {size:#x} bytes: use whole pages")
            if gpa < before:
                raise UsageError(f"memory on demand at {span(gpa, size)} overlaps the range before it")
            before = gpa + size

    def _check_devices(self, memory: Memory, gpa: int, size: int) -> None:
        bus = memory.native.bus
        for window in bus.ranges[0 : bus.count] if bus else ():
            if window.base < gpa + size and gpa < window.base + window.size:
                raise UsageError(
                    f"memory on demand at {span(gpa, size)} would hide the device at {hex_(window.base)} from the guest"
                )
