# SPDX-License-Identifier: Apache-2.0
"""Guest memory: slots over backings, guarded access by guest address, and the ledger of who may touch what.

A ``Memory`` owns the backings it was given (open or not any more), the table in ``pv_vm.map`` and the ledger. It
belongs to the process that made it: KVM refuses a VM's calls from any other mm, and the mappings are not inherited.

Threads: the guarded accesses (``read``, ``write``, ``fill``, ``probe``) and the properties take no lock. They see the
table before or after a change; every change takes the memory's lock. Lock order: whatever :attr:`Memory.quiesce`
takes, then the memory's lock.

Teardown: vCPUs, then the VM, then memory. Pages of a protected guest are given back by the VM's end alone.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager, nullcontext

from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError, UsageError, hex_
from pyvmm.memory.address import PAGE_SIZE, Gpa, Hva, align_down, align_up, is_aligned, pages, span
from pyvmm.memory.backing import Backing, Memfd, check_usable, guard_copies
from pyvmm.memory.ledger import ASSUMED, Area, Ledger, PageState
from pyvmm.memory.slots import Piece, Slot, SlotTable
from pyvmm.protection import Protection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import Self

    from pyvmm._native import pv_vm
    from pyvmm.kvm.vm import Vm
    from pyvmm.memory.conversion import CopyConversion

FILL_CHUNK = 1 << 16
DEFAULT_IPA_BITS = 40
"""What arm64 KVM gives a VM of type 0 (Documentation/virt/kvm/api.rst, KVM_CREATE_VM)."""


class Memory:
    """The memory of one VM; a context manager.

    ``native_vm`` is the VM's ``struct pv_vm *``, whose ``map`` and ``pages`` belong to this object. ``ipa_bits`` is
    the size of the guest's physical address space where the VM was not created with the default type (40 on arm64).
    """

    def __init__(self, vm: Vm, protection: Protection, native_vm: pv_vm, *, ipa_bits: int | None = None) -> None:
        guard_copies()
        self.protection = protection
        self.native = native_vm
        self.ledger = Ledger(native_vm)
        self.on_evidence: Callable[[Gpa, bool], None] | None = None
        """Under pkvm, called after a guarded access with each page whose ledger entry the access bears on: (page,
        accessible). Accessible does not mean shared: a page the guest has not touched yet is open to the host too."""
        self.on_change: Callable[[str, Gpa, int], None] | None = None
        """Called after what is done to memory from this side: ("slot", "convert" or "punch", gpa, size)."""
        self.quiesce: Callable[[], AbstractContextManager[object]] = nullcontext
        """What :meth:`convert` runs under: it should keep the other vCPUs out of the guest, as slots move."""
        if ipa_bits is None and os.uname().machine == "aarch64":
            ipa_bits = DEFAULT_IPA_BITS
        self._table = SlotTable(vm, native_vm, ipa_bits=ipa_bits)
        self._owned: list[Backing] = []
        self._copies: CopyConversion | None = None
        self._lock = threading.RLock()
        self._sealed = False
        self._punched = False
        self._pid = os.getpid()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- slots

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What was added and not removed, sorted by gpa."""
        return self._table.slots

    @property
    def free_slots(self) -> int:
        """How many more memslots the kernel takes."""
        return self._table.free

    def contains(self, gpa: int, size: int = 1) -> bool:
        """Whether all of ``[gpa, gpa + size)`` is guest memory."""
        return 0 < size == self._table.reach(gpa, size)

    def hva(self, gpa: int, size: int = PAGE_SIZE) -> Hva:
        """Return where KVM faults ``[gpa, gpa + size)`` in: what to register with a ``Userfault``.

        UsageError where that is not one piece of one slot, or for what is no whole pages.
        """
        parts = self._parts(gpa, size, "find the address of")
        if len(parts) != 1:
            raise UsageError(f"{span(gpa, size)} is not one piece of memory for KVM, but {len(parts)}")
        [(_, piece)] = parts
        return Hva(piece.backing.hva + piece.offset)

    def describe(self, gpa: int) -> str:
        """Say in words what is known of the page that holds ``gpa``."""
        return self.ledger.describe(gpa)

    def add(self, gpa: int, backing: Backing, *, offset: int = 0, size: int | None = None) -> Slot:
        """Make ``[gpa, gpa + size)`` guest memory over ``backing`` from ``offset`` (all that follows unless told).

        The backing is closed with this memory, from this call on. Raises :class:`UsageError` for what KVM would refuse
        (alignment, overlap, sizes, the number of slots) or would accept and fail on later, KvmError for the rest.
        Once the guest runs, load the backing first: under pkvm and emulated its pages are the guest's at once.
        """
        size = backing.size - offset if size is None else size
        with self._changing():
            self._take(gpa, size, backing, offset)
            if self.protection is Protection.EMULATED:
                backing.separate_view()
                if self._sealed:
                    backing.hide(offset, size)
            area = Area.new(Gpa(gpa), size)
            slot = Slot(Gpa(gpa), size, backing, offset, area)
            # The ledger first, so that no page the guest can touch is ever without an entry.
            self.ledger.enter(area)
            self._table.publish(slot)
            self._enter(slot, self._first_entry(backing))
            try:
                self._table.switch(slot, [Piece(slot.gpa, size, backing, offset)])
            except BaseException:
                self._enter(slot, PageState.ABSENT)
                self._table.withdraw(slot)
                self.ledger.drop(area)
                raise
            self._tell("slot", slot.gpa, size)
            return slot

    def reserve(self, gpa: int, backing: Backing) -> None:
        """Close ``backing`` with this memory, and check as :meth:`add` does that it could be added at ``gpa``, whole.

        Adds nothing: parts of it may be added later, where they would have been.
        """
        with self._changing():
            self._take(gpa, backing.size, backing, 0)

    def remove(self, slot: Slot) -> None:
        """Take a slot away; its backing stays open until it is closed, or this memory is.

        A guest that touches it then exits with KVM_EXIT_MMIO. Refused once a protected guest has run.
        """
        with self._changing():
            if not any(each is slot for each in self.slots):
                raise UsageError(f"the {slot} is not, or no longer, part of this memory")
            if self.protection is Protection.PKVM and self._sealed:
                raise UsageError(
                    f"the {slot} cannot be removed: once a protected guest has run, the kernel refuses to delete or "
                    "move its slots (EPERM), because pages given to the guest come back only when the VM ends",
                    hint="remove slots before the first run, or add new ones beside it",
                )
            pieces = slot.pieces
            self._table.switch(slot, [])
            self._enter(slot, PageState.ABSENT)
            self._table.withdraw(slot)
            self.ledger.drop(slot.area)
            if self._copies is not None:
                self._copies.forget(slot, pieces)
            self._tell("slot", slot.gpa, slot.size)

    def seal(self) -> None:
        """Enter the protection just before the first run: from here on pages are what it says, not the host's.

        Everything the guest starts with must be loaded by now. Idempotent. Under emulated the host's view of every
        page closes; under pkvm the ledger assumes the worst, since nobody tells when a page is donated.
        """
        with self._changing():
            if self._sealed:
                return
            for slot in self.slots:
                self._enter(slot, self._protected_entry(slot.backing))
                if self.protection is Protection.EMULATED:
                    slot.backing.hide(slot.offset, slot.size)
            self._sealed = True

    def convert(self, gpa: int, shared: bool) -> int:
        """Do a conversion of the copy policy (emulated, PV_STOP_CONVERT): move the page at ``gpa`` to another backing.

        Returns what the guest is told: 0, or an SMCCC error. The native loop enters it in the ledger when it goes on.
        """
        if self.protection is not Protection.EMULATED:
            raise UsageError(f"protection {self.protection.value}: only the emulated protection's pages move")
        from pyvmm.memory.conversion import SMCCC_SUCCESS, CopyConversion

        with self.quiesce(), self._changing():
            if self._copies is None:
                self._copies = CopyConversion(self._table, self._own)
            status = self._copies.convert(Gpa(gpa), shared=shared)
            if status == SMCCC_SUCCESS:
                self._tell("convert", Gpa(gpa), PAGE_SIZE)
            return status

    def punch(self, gpa: int, size: int, *, unsafe: bool = False) -> None:
        """Drop pages from their backing: the next touch, the guest's or the host's, finds zeros, and nobody is told.

        Refused once a protected guest has run, unless ``unsafe``: donated pages stay pinned, so nothing is freed, host
        and guest then see two different pages, and a large folio hit in part is zeroed by the kernel through its own
        mapping, which destroys the donated pages in it for good.
        """
        with self._changing():
            parts = self._parts(gpa, size, "punch a hole in")
            if self.protection is Protection.PKVM and self._sealed and not unsafe:
                raise UsageError(
                    f"no hole is punched in {span(gpa, size)}: a protected guest keeps the pages it was given, the "
                    "host would see different ones from then on, and a huge page hit in part would be destroyed",
                    hint="unsafe=True does it all the same, for the experiment",
                )
            for slot, piece in parts:
                piece.backing.punch(piece.offset, piece.size)
                self.ledger.fill(slot.area, piece.gpa, piece.size, PageState.HOLE, quiet=not self._sealed)
            self._punched = True
            self._tell("punch", Gpa(gpa), size)

    def populate(self, gpa: int, size: int) -> None:
        """Allocate, zero and map pages on the host's side now, so that the guest's first touch costs less.

        Contents stay. HostError where the kernel lacks MADV_POPULATE_WRITE, or memory.
        """
        with self._changing():
            for _, piece in self._parts(gpa, size, "populate"):
                piece.backing.populate(piece.offset, piece.size)

    def load_file(self, gpa: int, fd: int, at: int, size: int) -> int:
        """Read ``size`` bytes at ``at`` of a file straight to ``gpa``, before :meth:`seal`.

        Returns how many there were; OSError where they cannot be read.
        """
        with self._changing():
            if self._sealed:
                raise UsageError(f"{span(gpa, size)} may be the guest's by now: a file is loaded before the first run")
            start = align_down(gpa)
            done = 0
            for _, piece in self._parts(start, align_up(gpa + size) - start, "load"):
                low, high = max(gpa, piece.gpa), min(gpa + size, piece.end)
                now = piece.backing.load_file(piece.offset + low - piece.gpa, fd, at + low - gpa, high - low)
                done += now
                if now < high - low:
                    break
            return done

    # -- guarded access

    def read(self, gpa: int, size: int) -> bytes:
        """Read ``size`` bytes; GuestMemoryError where the host may not, never a signal, never through the kernel."""
        self._check_alive()
        self._check_access(gpa, size)
        # A size that a guest made up must not allocate more than there is.
        data = bytearray(self._table.reach(gpa, size))
        done = lib.pv_read(self.native, gpa, ffi.from_buffer("uint8_t[]", data), len(data), ffi.NULL)
        self._finish("read", gpa, size, done)
        return bytes(data)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data``; on GuestMemoryError the first ``done`` bytes of it are in guest memory."""
        self._check_alive()
        size = len(data)
        self._check_access(gpa, size)
        done = lib.pv_write(self.native, gpa, ffi.from_buffer("uint8_t[]", data), size, ffi.NULL)
        self._finish("write", gpa, size, done)

    def fill(self, gpa: int, size: int, byte: int = 0) -> None:
        """Set ``size`` bytes to ``byte``; fails as :meth:`write` does."""
        self._check_alive()
        self._check_access(gpa, size)
        chunk = bytes([byte]) * min(size, FILL_CHUNK)
        done = 0
        while done < size:
            part = min(size - done, FILL_CHUNK)
            now = lib.pv_write(self.native, gpa + done, ffi.from_buffer("uint8_t[]", chunk), part, ffi.NULL)
            done += now
            if now < part:
                break
        self._finish("fill", gpa, size, done)

    def probe(self, gpa: int) -> bool:
        """Whether the host can read the byte at ``gpa`` just now; False outside every slot."""
        self._check_alive()
        self._check_access(gpa, 1)
        result = lib.pv_probe(self.native, gpa)
        if result >= 0:
            self._learn(gpa, 1, result > 0)
        return bool(result > 0)

    def locked_report(self) -> str:
        """Say how much memory this process has locked, and its limit."""
        from pyvmm.memory.memlock import LockedMemory

        return str(LockedMemory.read())

    def close(self) -> None:
        """Close every backing that was ever added. Idempotent; in a forked child it only closes descriptors."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if os.getpid() == self._pid:
                self._table.close()
            for backing in self._owned:
                backing.close()
            self._owned.clear()

    # -- inside

    def _tell(self, kind: str, gpa: Gpa, size: int) -> None:
        if self.on_change is not None:
            self.on_change(kind, gpa, size)

    def _take(self, gpa: int, size: int, backing: Backing, offset: int) -> None:
        self._own(backing)
        huge = isinstance(backing, Memfd) and backing.hugetlb
        self.check_usable(repr(backing), guest_memfd=backing.guest_memfd is not None, huge=huge)
        self._table.check_new(gpa, size, backing, offset)

    def _own(self, backing: Backing) -> None:
        if not any(each is backing for each in self._owned):
            self._owned = [*(each for each in self._owned if not each.closed), backing]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            self._check_alive()
            yield

    def _check_alive(self) -> None:
        if self._closed:
            raise UsageError("this memory is closed")
        if os.getpid() != self._pid:
            raise UsageError(
                f"guest memory of process {self._pid} is used in process {os.getpid()}: it is not inherited by a fork, "
                "and KVM answers only the process that made the VM",
                hint="use threads, or make the VM in the child",
            )

    def check_usable(self, what: str, *, guest_memfd: bool, huge: bool) -> None:
        """Raise UsageError for a kind of backing that no slot in this protection can use; ``what`` names it."""
        check_usable(self.protection, what, guest_memfd=guest_memfd, huge=huge)

    def _enter(self, slot: Slot, entry: int) -> None:
        self.ledger.fill(slot.area, slot.gpa, slot.size, entry, quiet=not self._sealed)

    def _first_entry(self, backing: Backing) -> int:
        if self._sealed:
            return self._protected_entry(backing)
        return PageState.HOST if backing.host_access else PageState.PRIVATE

    def _protected_entry(self, backing: Backing) -> int:
        match self.protection:
            case Protection.NONE:
                return PageState.HOST if backing.host_access else PageState.PRIVATE
            case Protection.PKVM:
                return PageState.PRIVATE | ASSUMED
            case Protection.EMULATED:
                return PageState.PRIVATE

    def _parts(self, gpa: int, size: int, verb: str) -> list[tuple[Slot, Piece]]:
        if not (is_aligned(gpa) and is_aligned(size)):
            raise UsageError(f"cannot {verb} {span(gpa, size)}: both ends must be multiples of {PAGE_SIZE:#x}")
        if not self.contains(gpa, size):
            raise UsageError(f"cannot {verb} {span(gpa, size)}: not all of it is guest memory")
        return self._table.pieces(gpa, size)

    def _check_access(self, gpa: int, size: int) -> None:
        if gpa < 0 or size < 0 or gpa + size > 1 << 64:
            raise UsageError(f"{size} bytes at gpa {gpa:#x} are no range of guest physical addresses")

    def _finish(self, verb: str, gpa: int, size: int, done: int) -> None:
        """Look at what an access taught, and raise where it fell short."""
        error = None
        if done < size:
            stop = gpa + done
            state = self.describe(stop)
            if self.ledger.state(stop) in (PageState.HOST, PageState.SHARED, PageState.HOLE):
                state += " as far as is known, but cannot be reached"
            error = GuestMemoryError(f"{verb} of {size} bytes at gpa {hex_(gpa)}", stop, done, state)
        self._learn(gpa, done, True)
        if error:
            if self.contains(error.gpa):
                self._learn(error.gpa, 1, False)
            raise error

    def _learn(self, gpa: int, size: int, accessible: bool) -> None:
        if self.protection is Protection.PKVM:
            hook = self.on_evidence
            if hook is None or not self._sealed:
                return
            for page in pages(gpa, size):
                # A shared page that is open, and an unshared one that is closed, are as the ledger has them.
                if (self.ledger.entry(page) == PageState.SHARED) != accessible:
                    hook(Gpa(page), accessible)
        elif self._punched and accessible:
            # The access itself has filled the hole.
            refilled = PageState.HOST if self.protection is Protection.NONE else PageState.SHARED
            for page in pages(gpa, size):
                if self.ledger.state(page) is PageState.HOLE:
                    self.ledger.set(page, refilled)
