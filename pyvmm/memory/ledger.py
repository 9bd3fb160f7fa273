# SPDX-License-Identifier: Apache-2.0
"""What is known about every guest page, one byte each, in memory that the native loop writes too.

Owns the byte arrays (one :class:`Area` for each range of guest memory ever added) and the counters ``pv_vm.pages``.
:class:`pyvmm.memory.memory.Memory` adds and drops areas; anyone may read. A byte is stored whole, so a reader sees
the state before or after a change, never a mixture.
"""

from __future__ import annotations

from bisect import bisect_right
from enum import IntEnum

from pyvmm._native import ffi, lib
from pyvmm.errors import UsageError, hex_
from pyvmm.memory.address import PAGE_SHIFT, PAGE_SIZE, Gpa

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import Pointer, pv_vm

ASSUMED = 0x80
"""Or-ed into an entry: the kernel does not tell, this is what must be assumed (PV_PAGE_ASSUMED)."""

_MOVING = 0x40
"""The native loop's own mark on a page being taken back (PV_PAGE_MOVING of native/loop/loop.h); no reader sees it."""
_SETTLED = bytes(entry & ~_MOVING for entry in range(256))


class PageState(IntEnum):
    """``enum pv_page`` of native/loop/cdef.h."""

    ABSENT = 0
    """No slot holds this page."""
    HOST = 1
    """The host's own to read and write: no protection, or the guest has not run yet."""
    PRIVATE = 2
    """The guest's alone."""
    SHARED = 3
    """The guest's, and open to the host until the guest takes it back."""
    HOLE = 4
    """Punched out of its backing; the next touch fills it with zeros, which nobody is told of."""
    POISONED = 5
    """Taken back by the host by force: its contents are gone, and the guest cannot touch it."""


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
    """Say in words what a ledger entry (with or without ASSUMED) means."""
    words = _WORDS[_STATES[entry & ~ASSUMED]]
    return f"{words} (assumed: the kernel does not tell)" if entry & ASSUMED else words


class Area:
    """The entries of one range that was added whole; slots over parts of it use parts of the array."""

    __slots__ = ("entries", "gpa", "size")

    def __init__(self, gpa: Gpa, size: int, entries: Pointer[int]) -> None:
        self.gpa = gpa
        self.size = size
        self.entries = entries
        """``uint8_t[size / 4096]``"""

    @classmethod
    def new(cls, gpa: Gpa, size: int) -> Area:
        """Make the entries of ``[gpa, gpa + size)``, all ABSENT."""
        return cls(gpa, size, ffi.new("uint8_t[]", size >> PAGE_SHIFT))


class Ledger:
    """The page ledger of one VM."""

    def __init__(self, native_vm: pv_vm) -> None:
        self._vm = native_vm
        # Starts and areas in one tuple, so that a reader never sees those of different times.
        self._index: tuple[tuple[int, ...], tuple[Area, ...]] = ((), ())

    def state(self, gpa: int) -> PageState:
        """Return what is known of the page that holds ``gpa``; ABSENT outside every slot."""
        return _STATES[self.entry(gpa) & ~ASSUMED]

    def assumed(self, gpa: int) -> bool:
        """Whether the state of the page at ``gpa`` is an assumption, for want of anyone telling."""
        return bool(self.entry(gpa) & ASSUMED)

    def entry(self, gpa: int) -> int:
        """Return the byte of the page that holds ``gpa``, ASSUMED included."""
        area = self._area(gpa)
        return area.entries[(gpa - area.gpa) >> PAGE_SHIFT] & ~_MOVING if area else PageState.ABSENT.value

    def describe(self, gpa: int) -> str:
        """Say in words what is known of the page that holds ``gpa``."""
        return describe(self.entry(gpa))

    def set(self, gpa: int, state: PageState, *, assumed: bool = False) -> PageState:
        """Enter ``state`` for the page that holds ``gpa``; returns what was there. UsageError outside every slot."""
        old: int = lib.pv_ledger_set(self._vm, gpa, state | ASSUMED if assumed else state)
        if old < 0:
            raise UsageError(f"gpa {hex_(gpa)} is {_WORDS[PageState.ABSENT]}: the ledger has no entry for it")
        return _STATES[old & ~ASSUMED]

    def counts(self) -> dict[PageState, int]:
        """Count the pages in each state, assumed ones included; ABSENT are holes left by removed slots."""
        totals = dict.fromkeys(PageState, 0)
        for _, entries in self.snapshot():
            for state in PageState:
                totals[state] += entries.count(state) + entries.count(state | ASSUMED)
        return totals

    def snapshot(self) -> list[tuple[Gpa, bytes]]:
        """Copy every area's entries: (first gpa, one byte a page), sorted. Areas are copied one after the other."""
        return [(area.gpa, bytes(ffi.buffer(area.entries)).translate(_SETTLED)) for area in self._index[1]]

    def entries(self, gpa: int, size: int) -> bytes:
        """Copy the entries of the pages that ``[gpa, gpa + size)`` touches, as far as one area reaches."""
        area = self._area(gpa)
        if area is None or size <= 0:
            return b""
        first = (gpa - area.gpa) >> PAGE_SHIFT
        last = (min(gpa + size, area.gpa + area.size) - area.gpa - 1) >> PAGE_SHIFT
        return bytes(ffi.buffer(area.entries + first, last - first + 1)).translate(_SETTLED)

    def enter(self, area: Area) -> None:
        """Add an area (Memory only)."""
        # Only Memory moves pages to and from ABSENT, under its lock: this counter needs no atomics.
        self._vm.pages[PageState.ABSENT] += area.size >> PAGE_SHIFT
        starts, areas = self._index
        at = bisect_right(starts, area.gpa)
        self._index = (*starts[:at], area.gpa, *starts[at:]), (*areas[:at], area, *areas[at:])

    def drop(self, area: Area) -> None:
        """Forget an area whose pages are ABSENT again (Memory only)."""
        self._vm.pages[PageState.ABSENT] -= area.size >> PAGE_SHIFT
        starts, areas = self._index
        at = areas.index(area)
        self._index = starts[:at] + starts[at + 1 :], areas[:at] + areas[at + 1 :]

    def fill(self, area: Area, gpa: int, size: int, entry: int, *, quiet: bool) -> None:
        """Enter the same byte for every page of a range of a published slot (Memory only).

        ``quiet``: no vCPU has run yet, so bytes and counters may be written without the native loop's atomics.
        """
        if not quiet:
            for page in range(gpa, gpa + size, PAGE_SIZE):
                lib.pv_ledger_set(self._vm, page, entry)
            return
        part = ffi.buffer(area.entries + ((gpa - area.gpa) >> PAGE_SHIFT), size >> PAGE_SHIFT)
        left = bytes(part)
        self._vm.pages[entry & ~ASSUMED] += len(left)
        part[:] = bytes([entry]) * len(left)
        while left:  # at a start all of them are the same
            old, count = left[0], left.count(left[0])
            self._vm.pages[old & ~ASSUMED] -= count
            left = left.replace(left[:1], b"") if count < len(left) else b""

    def _area(self, gpa: int) -> Area | None:
        starts, areas = self._index
        number = bisect_right(starts, gpa) - 1
        if number < 0 or gpa >= areas[number].gpa + areas[number].size:
            return None
        return areas[number]
