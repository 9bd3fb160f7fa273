# SPDX-License-Identifier: Apache-2.0
"""The state of every guest page, one byte each, in memory that the native loop also writes.

Owns the byte arrays (one :class:`Area` for each range of guest memory ever added) and the counters ``pv_vm.pages``.
:class:`pyvmm.memory.memory.Memory` adds and drops areas; anyone may read. A byte is stored whole, so a reader sees
the state before or after a change, never a mixture.
"""

from __future__ import annotations

from bisect import bisect_right
from enum import IntEnum

from pyvmm._native import ffi, lib
from pyvmm.errors import UsageError, hex_
from pyvmm.memory.address import Gpa
from pyvmm.pages import HOST_PAGE, HOST_PAGE_SHIFT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import Pointer, pv_vm

ASSUMED = 0x80
"""Or-ed into an entry: the kernel does not report the state, so it is assumed (PV_PAGE_ASSUMED)."""

_MOVING = 0x40
"""The native loop's mark on a page being unshared (PV_PAGE_MOVING of native/loop/loop.h). No reader sees it."""
_SETTLED = bytes(entry & ~_MOVING for entry in range(256))


class PageState(IntEnum):
    """``enum pv_page`` of native/loop/cdef.h."""

    ABSENT = 0
    """No slot holds this page."""
    HOST = 1
    """The host may read and write it: no protection, or the guest has not run yet."""
    PRIVATE = 2
    """Private to the guest."""
    SHARED = 3
    """Shared with the host until the guest unshares it."""
    HOLE = 4
    """Punched out of its backing. The next access fills it with zeros, without a report."""
    POISONED = 5
    """Taken back by the host by force. Its contents are lost, and the guest cannot access it."""


_STATES = tuple(PageState)
_WORDS = {
    PageState.ABSENT: "in no memory slot",
    PageState.HOST: "the host's",
    PageState.PRIVATE: "private to the guest",
    PageState.SHARED: "shared by the guest",
    PageState.HOLE: "a hole punched in its backing",
    PageState.POISONED: "poisoned: it was reclaimed by the host",
}


def describe(entry: int) -> str:
    """Describe a ledger entry, with or without ASSUMED."""
    words = _WORDS[_STATES[entry & ~ASSUMED]]
    return f"{words} (assumed: the kernel does not tell)" if entry & ASSUMED else words


class Area:
    """The entries of one range that was added as a whole. Slots over parts of it use parts of the array."""

    __slots__ = ("entries", "gpa", "size")

    def __init__(self, gpa: Gpa, size: int, entries: Pointer[int]) -> None:
        self.gpa = gpa
        self.size = size
        self.entries = entries
        """``uint8_t[size / 4096]``"""

    @classmethod
    def new(cls, gpa: Gpa, size: int) -> Area:
        """Make the entries of ``[gpa, gpa + size)``, all ABSENT."""
        return cls(gpa, size, ffi.new("uint8_t[]", size >> HOST_PAGE_SHIFT))


class Ledger:
    """The page ledger of one VM."""

    def __init__(self, native_vm: pv_vm) -> None:
        self._vm = native_vm
        # Starts and areas in one tuple, so that a reader always sees a consistent pair.
        self._index: tuple[tuple[int, ...], tuple[Area, ...]] = ((), ())

    def state(self, gpa: int) -> PageState:
        """Return the state of the page with ``gpa``; ABSENT outside of all slots."""
        return _STATES[self.entry(gpa) & ~ASSUMED]

    def assumed(self, gpa: int) -> bool:
        """Whether the state of the page with ``gpa`` is an assumption."""
        return bool(self.entry(gpa) & ASSUMED)

    def entry(self, gpa: int) -> int:
        """Return the entry of the page with ``gpa``, including ASSUMED."""
        area = self._area(gpa)
        return area.entries[(gpa - area.gpa) >> HOST_PAGE_SHIFT] & ~_MOVING if area else PageState.ABSENT.value

    def describe(self, gpa: int) -> str:
        """Describe the state of the page with ``gpa``."""
        return describe(self.entry(gpa))

    def set(self, gpa: int, state: PageState, *, assumed: bool = False) -> PageState:
        """Set the state of the page with ``gpa`` and return the old one. Raises UsageError outside of all slots."""
        old: int = lib.pv_ledger_set(self._vm, gpa, state | ASSUMED if assumed else state)
        if old < 0:
            raise UsageError(f"gpa {hex_(gpa)} is {_WORDS[PageState.ABSENT]}: the ledger has no entry for it")
        return _STATES[old & ~ASSUMED]

    def counts(self) -> dict[PageState, int]:
        """Count the pages in each state, including assumed ones. ABSENT are holes of removed slots."""
        totals = dict.fromkeys(PageState, 0)
        for _, entries in self.snapshot():
            for state in PageState:
                totals[state] += entries.count(state) + entries.count(state | ASSUMED)
        return totals

    def snapshot(self) -> list[tuple[Gpa, bytes]]:
        """Copy every area's entries: (first gpa, one byte a page), sorted. Areas are copied one after the other."""
        return [(area.gpa, bytes(ffi.buffer(area.entries)).translate(_SETTLED)) for area in self._index[1]]

    def entries(self, gpa: int, size: int) -> bytes:
        """Copy the entries of the pages in ``[gpa, gpa + size)``, up to the end of their area."""
        area = self._area(gpa)
        if area is None or size <= 0:
            return b""
        first = (gpa - area.gpa) >> HOST_PAGE_SHIFT
        last = (min(gpa + size, area.gpa + area.size) - area.gpa - 1) >> HOST_PAGE_SHIFT
        return bytes(ffi.buffer(area.entries + first, last - first + 1)).translate(_SETTLED)

    def enter(self, area: Area) -> None:
        """Add an area (Memory only)."""
        # Only Memory moves pages to and from ABSENT, under its lock: this counter needs no atomics.
        self._vm.pages[PageState.ABSENT] += area.size >> HOST_PAGE_SHIFT
        starts, areas = self._index
        at = bisect_right(starts, area.gpa)
        self._index = (*starts[:at], area.gpa, *starts[at:]), (*areas[:at], area, *areas[at:])

    def drop(self, area: Area) -> None:
        """Forget an area whose pages are ABSENT again (Memory only)."""
        self._vm.pages[PageState.ABSENT] -= area.size >> HOST_PAGE_SHIFT
        starts, areas = self._index
        at = areas.index(area)
        self._index = starts[:at] + starts[at + 1 :], areas[:at] + areas[at + 1 :]

    def fill(self, area: Area, gpa: int, size: int, entry: int, *, quiet: bool) -> None:
        """Set the same entry for every page of a range of a published slot (Memory only).

        ``quiet``: no vCPU has run yet, so bytes and counters may be written without the native loop's atomics.
        """
        if not quiet:
            for page in range(gpa, gpa + size, HOST_PAGE):
                lib.pv_ledger_set(self._vm, page, entry)
            return
        part = ffi.buffer(area.entries + ((gpa - area.gpa) >> HOST_PAGE_SHIFT), size >> HOST_PAGE_SHIFT)
        left = bytes(part)
        self._vm.pages[entry & ~ASSUMED] += len(left)
        part[:] = bytes([entry]) * len(left)
        while left:  # at the start all entries are the same
            old, count = left[0], left.count(left[0])
            self._vm.pages[old & ~ASSUMED] -= count
            left = left.replace(left[:1], b"") if count < len(left) else b""

    def _area(self, gpa: int) -> Area | None:
        starts, areas = self._index
        number = bisect_right(starts, gpa) - 1
        if number < 0 or gpa >= areas[number].gpa + areas[number].size:
            return None
        return areas[number]
