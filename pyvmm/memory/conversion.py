# SPDX-License-Identifier: Apache-2.0
"""The copy conversion policy, in Python: each shared page moves to a second file of its slot.

Owns the files of shared pages, through the ``Memory`` that closes them. Only ``Memory`` calls it, under its lock. Under
pkvm there is no policy: the hypervisor keeps the contents in place.
"""

from __future__ import annotations

from contextlib import contextmanager

from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError
from pyvmm.memory import mman
from pyvmm.memory.address import Gpa, Hva, is_aligned
from pyvmm.memory.backing import Backing, Memfd
from pyvmm.memory.slots import Piece, Slot, SlotTable, carve
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SMCCC_SUCCESS = 0
SMCCC_NOT_SUPPORTED = -1
SMCCC_INVALID_PARAMETER = -3


class CopyConversion:
    """Moves single pages between a slot's backing (private) and a second memfd (shared).

    The contents move along, except with a guest_memfd without INIT_SHARED, which the host cannot access. Such a page
    becomes zero, in both directions. No stale copy remains.
    """

    def __init__(self, table: SlotTable, own: Callable[[Backing], None]) -> None:
        self._table = table
        self._own = own
        self._shared: dict[Slot, Memfd] = {}

    def convert(self, gpa: Gpa, *, shared: bool) -> int:
        """Move the page at ``gpa``. Returns the guest's result: 0, or an SMCCC error for an invalid request.

        Raises KvmError or HostError if the host fails. The page then has not moved. If only dropping the old copy
        failed, the page has moved.
        """
        slot = self._table.at(gpa)
        if slot is None or not is_aligned(gpa):
            return SMCCC_INVALID_PARAMETER
        shared_file = self._shared.get(slot)
        [(_, here)] = self._table.pieces(gpa, HOST_PAGE)
        if (here.backing is shared_file) == shared:
            return SMCCC_INVALID_PARAMETER
        if shared:
            there = Piece(gpa, HOST_PAGE, shared_file or self._file_for(slot), gpa - slot.gpa)
        else:
            there = Piece(gpa, HOST_PAGE, slot.backing, slot.offset + gpa - slot.gpa)
        pieces = carve(slot.pieces, there)
        if not self._table.room_for(slot, pieces):
            return SMCCC_NOT_SUPPORTED
        view = Hva(slot.view + gpa - slot.gpa)
        # The host sees the page only while it is shared, and never the copy that is about to be dropped.
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
        here.backing.punch(here.offset, HOST_PAGE)
        return SMCCC_SUCCESS

    def forget(self, slot: Slot, pieces: Sequence[Piece]) -> None:
        """Map the view of a removed slot to its own backing again. ``pieces`` are the slot's former pieces."""
        shared_file = self._shared.pop(slot, None)
        for piece in pieces:
            if piece.backing is shared_file:
                offset = piece.gpa - slot.gpa
                own = Piece(piece.gpa, piece.size, slot.backing, slot.offset + offset)
                _show(own, Hva(slot.view + offset), PROT_NONE)

    def _file_for(self, slot: Slot) -> Memfd:
        # As large as the slot, so that a page keeps its offset and neighbours join. Only shared pages take memory.
        self._shared[slot] = file = Memfd(slot.size)
        self._own(file)
        return file


def _show(piece: Piece, view: Hva, access: int) -> None:
    mman.map_over(view, piece.size, piece.backing.fd, piece.offset, access)


def _copy(here: Piece, there: Piece) -> None:
    if not (here.backing.host_access and there.backing.host_access):
        return  # already zero: it is fresh, or was punched when its page moved away
    with _reach(here) as source, _reach(there) as target:
        done = lib.pv_copy(ffi.cast("void *", target), ffi.cast("void *", source), HOST_PAGE)
    if done < HOST_PAGE:
        raise GuestMemoryError(
            "moving a page to another backing",
            here.gpa + done,
            done,
            "not accessible to the host",
            hint="the machine or this control group is out of memory",
        )


@contextmanager
def _reach(piece: Piece) -> Iterator[Hva]:
    """Yield a private address of a page whose view may be hidden."""
    address = mman.map_shared(piece.backing.fd, HOST_PAGE, offset=piece.offset)
    try:
        yield address
    finally:
        mman.unmap(address, HOST_PAGE)
