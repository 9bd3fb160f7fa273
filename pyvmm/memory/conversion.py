# SPDX-License-Identifier: Apache-2.0
"""The conversion policy that Python carries out: each shared page moves to a file beside its slot.

Owns the files that shared pages are copied to, through the ``Memory`` that closes them. Only ``Memory`` calls it,
under its lock. Under pkvm there is nothing to choose: the hypervisor keeps the contents in place.
"""

from __future__ import annotations

from contextlib import contextmanager

from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError
from pyvmm.memory import mman
from pyvmm.memory.address import PAGE_SIZE, Gpa, Hva, is_aligned
from pyvmm.memory.backing import Backing, Memfd
from pyvmm.memory.slots import Piece, Slot, SlotTable, carve
from pyvmm.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SMCCC_SUCCESS = 0
SMCCC_NOT_SUPPORTED = -1
SMCCC_INVALID_PARAMETER = -3


class CopyConversion:
    """Moves single pages between a slot's own backing (private) and a memfd beside it (shared).

    The contents go along, except that what lies in a guest_memfd without INIT_SHARED is out of the host's reach: such
    a page arrives zeroed, in both directions. No stale copy is left behind.
    """

    def __init__(self, table: SlotTable, own: Callable[[Backing], None]) -> None:
        self._table = table
        self._own = own
        self._shared: dict[Slot, Memfd] = {}

    def convert(self, gpa: Gpa, *, shared: bool) -> int:
        """Move the page at ``gpa``; returns what the guest is told: 0, or an SMCCC error where its request is wrong.

        Raises KvmError or HostError where the host fails: the page is where it was then, or, if only dropping the old
        copy failed, at its new place.
        """
        slot = self._table.at(gpa)
        if slot is None or not is_aligned(gpa):
            return SMCCC_INVALID_PARAMETER
        shared_file = self._shared.get(slot)
        [(_, here)] = self._table.pieces(gpa, PAGE_SIZE)
        if (here.backing is shared_file) == shared:
            return SMCCC_INVALID_PARAMETER
        if shared:
            there = Piece(gpa, PAGE_SIZE, shared_file or self._file_for(slot), gpa - slot.gpa)
        else:
            there = Piece(gpa, PAGE_SIZE, slot.backing, slot.offset + gpa - slot.gpa)
        pieces = carve(slot.pieces, there)
        if not self._table.room_for(slot, pieces):
            return SMCCC_NOT_SUPPORTED
        view = Hva(slot.view + gpa - slot.gpa)
        # The host sees the page only while it is shared, and of two copies never the one that is going away.
        try:
            if shared:
                _copy(here, there)
                _show(there, view, PROT_READ | PROT_WRITE)
            else:
                _show(there, view, PROT_NONE)
                _copy(here, there)
            self._table.switch(slot, pieces)
        except BaseException:
            _show(here, view, PROT_NONE if shared else PROT_READ | PROT_WRITE)
            raise
        here.backing.punch(here.offset, PAGE_SIZE)
        return SMCCC_SUCCESS

    def forget(self, slot: Slot, pieces: Sequence[Piece]) -> None:
        """Give the view of a slot that was removed back to its own backing; ``pieces`` is what it was in."""
        shared_file = self._shared.pop(slot, None)
        for piece in pieces:
            if piece.backing is shared_file:
                offset = piece.gpa - slot.gpa
                own = Piece(piece.gpa, piece.size, slot.backing, slot.offset + offset)
                _show(own, Hva(slot.view + offset), PROT_NONE)

    def _file_for(self, slot: Slot) -> Memfd:
        # As large as the slot, so that a page keeps its place and neighbours join; only what is shared takes memory.
        self._shared[slot] = file = Memfd(slot.size)
        self._own(file)
        return file


def _show(piece: Piece, view: Hva, access: int) -> None:
    mman.map_over(view, piece.size, piece.backing.fd, piece.offset, access)


def _copy(here: Piece, there: Piece) -> None:
    if not (here.backing.host_access and there.backing.host_access):
        return  # zeros there: it is fresh, or was punched when its page moved away
    with _reach(here) as source, _reach(there) as target:
        done = lib.pv_copy(ffi.cast("void *", target), ffi.cast("void *", source), PAGE_SIZE)
    if done < PAGE_SIZE:
        raise GuestMemoryError(
            "moving a page to another backing",
            here.gpa + done,
            done,
            "out of the host's reach",
            hint="the machine or this control group is out of memory",
        )


@contextmanager
def _reach(piece: Piece) -> Iterator[Hva]:
    """Yield an address of a page that other threads do not know of, where its view may be closed."""
    address = mman.map_shared(piece.backing.fd, PAGE_SIZE, offset=piece.offset)
    try:
        yield address
    finally:
        mman.unmap(address, PAGE_SIZE)
