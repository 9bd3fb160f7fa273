# SPDX-License-Identifier: Apache-2.0
"""Slots: the mapping of guest memory to backings, for KVM and for the native loop.

:class:`SlotTable` is the only caller of KVM_SET_USER_MEMORY_REGION(2) and the only writer of ``pv_vm.map``; only
:class:`pyvmm.memory.memory.Memory` uses it, under its lock. Each added range is one :class:`Slot`, one region of the
native loop and one area of the ledger, for its whole life. KVM may have several memslots for it (:class:`Piece`), after
pages were moved to another backing.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

from pyvmm._native import ffi, lib
from pyvmm.errors import PyvmmError, UsageError, hex_
from pyvmm.memory.address import Gpa, Hva, is_aligned, span
from pyvmm.memory.backing import Backing
from pyvmm.pages import HOST_PAGE
from pyvmm.typed import NamedTuple
from pyvmm.uapi.kvm_cap import KVM_CAP_NR_MEMSLOTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import pv_map, pv_vm
    from pyvmm.kvm.vm import Vm
    from pyvmm.memory.ledger import Area


class Piece(NamedTuple):
    """One memslot of KVM: ``[gpa, gpa + size)`` lies at ``offset`` of ``backing``."""

    gpa: Gpa
    size: int
    backing: Backing
    offset: int

    @property
    def end(self) -> Gpa:
        """First byte behind it."""
        return Gpa(self.gpa + self.size)

    def continues(self, before: Piece) -> bool:
        """Whether it starts where ``before`` ends, in guest memory and in the backing."""
        same = self.backing is before.backing and self.offset == before.offset + before.size
        return same and self.gpa == before.end

    def overlap(self, gpa: int, size: int) -> Piece | None:
        """Return its part within ``[gpa, gpa + size)``."""
        start, end = max(gpa, self.gpa), min(gpa + size, self.end)
        if start >= end:
            return None
        return Piece(Gpa(start), end - start, self.backing, self.offset + start - self.gpa)


def carve(pieces: Sequence[Piece], new: Piece) -> list[Piece]:
    """Replace the covered part of ``pieces`` by ``new``, and join adjacent pieces that continue each other."""
    left_over = [new]
    for piece in pieces:
        left = piece.overlap(piece.gpa, max(0, new.gpa - piece.gpa))
        right = piece.overlap(new.end, max(0, piece.end - new.end))
        left_over += [part for part in (left, right) if part]
    joined: list[Piece] = []
    for piece in sorted(left_over, key=lambda each: each.gpa):
        if joined and piece.continues(joined[-1]):
            before = joined.pop()
            piece = Piece(before.gpa, before.size + piece.size, before.backing, before.offset)
        joined.append(piece)
    return joined


class Slot:
    """A range of guest memory, as added. Only Memory changes it."""

    __slots__ = ("area", "backing", "gpa", "offset", "pieces", "size")

    def __init__(self, gpa: Gpa, size: int, backing: Backing, offset: int, area: Area) -> None:
        self.gpa = gpa
        self.size = size
        self.backing = backing
        self.offset = offset
        self.area = area
        self.pieces: list[Piece] = []
        """KVM's memslots for it: more than one after pages were moved to another backing."""

    @property
    def end(self) -> Gpa:
        """First byte behind it."""
        return Gpa(self.gpa + self.size)

    @property
    def hva(self) -> Hva:
        """The address of its first byte for KVM, unless that page was moved."""
        return Hva(self.backing.hva + self.offset)

    @property
    def view(self) -> Hva:
        """The address of its first byte for the host's own code."""
        return Hva(self.backing.view + self.offset)

    def __str__(self) -> str:
        return f"slot {span(self.gpa, self.size)} on {self.backing.kind}"


class SlotTable:
    """The slots of one VM, sorted by gpa."""

    def __init__(self, vm: Vm, native_vm: pv_vm, *, ipa_bits: int | None) -> None:
        self._vm = vm
        self._native = native_vm
        self._ipa_bits = ipa_bits
        self._most = vm.check(KVM_CAP_NR_MEMSLOTS)
        # Starts and slots in one tuple, so that a reader always sees a consistent pair.
        self._index: tuple[tuple[int, ...], tuple[Slot, ...]] = ((), ())
        self._numbers: dict[Piece, int] = {}
        self._free: list[int] = []
        """Freed memslot numbers, sorted."""
        self._used: dict[Backing, list[Piece]] = {}
        """KVM's memslots of each backing, sorted by offset."""
        self._regions = ffi.new("struct pv_region[]", 0)
        self._map: pv_map = ffi.NULL
        """The native loop's table. These two attributes keep it alive."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All slots, sorted by gpa."""
        return self._index[1]

    def at(self, gpa: int) -> Slot | None:
        """Return the slot that holds ``gpa``."""
        starts, slots = self._index
        number = bisect_right(starts, gpa) - 1
        return slots[number] if number >= 0 and gpa < slots[number].end else None

    def reach(self, gpa: int, size: int) -> int:
        """Return how many of the ``size`` bytes from ``gpa`` lie in slots without a gap."""
        done = 0
        while done < size and (slot := self.at(gpa + done)):
            done = slot.end - gpa
        return min(done, size)

    def pieces(self, gpa: int, size: int) -> list[tuple[Slot, Piece]]:
        """Return the parts of ``[gpa, gpa + size)``, each with its slot, without gaps."""
        starts, slots = self._index
        found = []
        for slot in slots[max(0, bisect_right(starts, gpa) - 1) : bisect_left(starts, gpa + size)]:
            found += [(slot, part) for piece in slot.pieces if (part := piece.overlap(gpa, size))]
        return found

    def check_new(self, gpa: int, size: int, backing: Backing, offset: int) -> None:
        """Raise a UsageError with the reason, where KVM would return only an errno."""
        what = f"a slot of {size:#x} bytes at gpa {hex_(gpa)} over {backing!r}"
        for name, value in (("gpa", gpa), ("size", size), ("offset", offset)):
            if value < 0 or not is_aligned(value):
                raise UsageError(f"{what}: its {name} {value:#x} is not a multiple of {HOST_PAGE:#x}")
        if backing.closed:
            raise UsageError(f"{what}: the backing is closed")
        if size == 0 or offset + size > backing.size:
            raise UsageError(
                f"{what}: offset {offset:#x} and the size do not fit the backing's {backing.size:#x} bytes",
                hint="make the backing larger, or name a part of it with offset= and size=",
            )
        if self._ipa_bits is not None and gpa + size > 1 << self._ipa_bits:
            raise UsageError(
                f"{what} ends beyond this VM's {self._ipa_bits} bits of guest physical address space",
                hint="the size is fixed when the VM is created: the low 8 bits of its type",
            )
        starts, slots = self._index
        # Slots are disjoint, and so are pieces of a backing, so only the last one that starts before the end can
        # overlap.
        number = bisect_left(starts, gpa + size) - 1
        if number >= 0 and gpa < slots[number].end:
            raise UsageError(f"{what}, {span(gpa, size)}, overlaps the {slots[number]}")
        pieces = self._used.get(backing, [])
        number = bisect_left(pieces, offset + size, key=_offset) - 1
        if number >= 0 and offset < pieces[number].offset + pieces[number].size:
            raise UsageError(
                f"{what}: bytes [{offset:#x}, {offset + size:#x}) of the backing already belong to the "
                f"{self.at(pieces[number].gpa)}",
                hint="one page of guest memory has one address; use another part of the backing",
            )
        if not self.free:
            raise self._too_many(what)

    @property
    def free(self) -> int:
        """The number of memslots that KVM still accepts."""
        return self._most - len(self._numbers)

    def publish(self, slot: Slot) -> None:
        """Make a new slot visible to the native loop. :meth:`switch` makes it visible to KVM."""
        at = bisect_right(self._index[0], slot.gpa)
        self._publish(at, at, slot)

    def withdraw(self, slot: Slot) -> None:
        """Remove a slot from the native loop. When this returns, the loop no longer reads it."""
        at = self.slots.index(slot)
        self._publish(at, at + 1)

    def room_for(self, slot: Slot, pieces: list[Piece]) -> bool:
        """Whether KVM has enough memslots for ``slot`` in these pieces."""
        return len(self._numbers) - len(slot.pieces) + len(pieces) <= self._most

    def switch(self, slot: Slot, pieces: list[Piece]) -> None:
        """Replace KVM's memslots of ``slot`` by ``pieces``, or restore the old ones if KVM refuses.

        In between there is no memslot, and an access exits with KVM_EXIT_MMIO. Pause the other vCPUs first.
        """
        old = [piece for piece in slot.pieces if piece not in pieces]
        new = [piece for piece in pieces if piece not in slot.pieces]
        if not self.room_for(slot, pieces):
            raise self._too_many(f"the {slot} in {len(pieces)} pieces")
        undo: list[tuple[bool, Piece]] = []
        try:
            for piece in old:
                self._delete(piece)
                undo.append((True, piece))
            for piece in new:
                self._set(piece)
                undo.append((False, piece))
        except BaseException:
            for restore, piece in reversed(undo):
                (self._set if restore else self._delete)(piece)
            raise
        slot.pieces = pieces

    def close(self) -> None:
        """Drop everything. Delete the slots of a live VM, before their addresses are reused."""
        lib.pv_publish_map(self._native, ffi.NULL)
        for piece in () if self._vm.closed else tuple(self._numbers):
            with contextlib.suppress(PyvmmError):  # a protected VM that has run refuses
                self._delete(piece)
        self._numbers.clear()
        self._used.clear()
        self._index = ((), ())
        self._regions, self._map = ffi.new("struct pv_region[]", 0), ffi.NULL

    def _set(self, piece: Piece) -> None:
        number = self._free.pop(0) if self._free else len(self._numbers)
        backing = piece.backing
        try:
            self._vm.set_memory(
                number,
                piece.gpa,
                piece.size,
                backing.hva + piece.offset,
                guest_memfd=backing.guest_memfd,
                offset=piece.offset if backing.guest_memfd else 0,
            )
        except BaseException:
            insort(self._free, number)
            raise
        self._numbers[piece] = number
        insort(self._used.setdefault(backing, []), piece, key=_offset)

    def _delete(self, piece: Piece) -> None:
        self._vm.delete_memory(self._numbers[piece])
        insort(self._free, self._numbers.pop(piece))
        used = self._used[piece.backing]
        del used[bisect_left(used, piece.offset, key=_offset)]
        if not used:
            del self._used[piece.backing]

    def _too_many(self, what: str) -> UsageError:
        return UsageError(
            f"{what}: the kernel accepts {self._most} slots per VM (KVM_CAP_NR_MEMSLOTS)",
            hint="use fewer, larger slots; adjacent parts of one backing need only one",
        )

    def _publish(self, first: int, end: int, *new: Slot) -> None:
        """Replace the slots with indices ``[first, end)`` by ``new``."""
        starts, slots = self._index
        starts = (*starts[:first], *(slot.gpa for slot in new), *starts[end:])
        slots = (*slots[:first], *new, *slots[end:])
        regions = ffi.new("struct pv_region[]", len(slots))
        each = ffi.sizeof("struct pv_region")
        ffi.memmove(regions, self._regions, first * each)
        for number, slot in enumerate(new, first):
            region = regions[number]
            region.gpa, region.size = slot.gpa, slot.size
            region.view = ffi.cast("uint8_t *", slot.view)
            region.ledger = slot.area.entries
            region.fd, region.fd_offset = slot.backing.fd, slot.offset
        ffi.memmove(regions + first + len(new), self._regions + end, (len(slots) - first - len(new)) * each)
        table = ffi.new("struct pv_map *", {"count": len(slots), "regions": regions})
        lib.pv_publish_map(self._native, table)
        # No reader uses the old table now.
        self._regions, self._map = regions, table
        self._index = starts, slots


def _offset(piece: Piece) -> int:
    return piece.offset
