# SPDX-License-Identifier: Apache-2.0
"""Guest memory: slots over backings, guarded access by guest address, and the page ledger.

A ``Memory`` owns its backings (open or closed), the table in ``pv_vm.map`` and the ledger. Only the process that made
it may use it: KVM refuses a VM's calls from any other mm, and the mappings are not inherited.

Threads: the guarded accesses (``read``, ``write``, ``fill``, ``probe``) and the properties take no lock. They see the
table before or after a change. Every change takes the memory's lock. Lock order: locks of :attr:`Memory.quiesce`, then
the memory's lock.

Teardown: vCPUs, then the VM, then memory. A protected guest's pages return to the host only when the VM ends.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager, nullcontext

from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError, UsageError, hex_
from pyvmm.memory.address import Gpa, Hva, align_down, align_up, is_aligned, pages, span
from pyvmm.memory.backing import Backing, Memfd, check_usable, guard_copies
from pyvmm.memory.ledger import ASSUMED, Area, Ledger, PageState
from pyvmm.memory.slots import Piece, Slot, SlotTable
from pyvmm.pages import HOST_PAGE
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
"""Address bits that arm64 KVM gives a VM of type 0 (Documentation/virt/kvm/api.rst, KVM_CREATE_VM)."""


class Memory:
    """The memory of one VM. A context manager.

    ``native_vm`` is the VM's ``struct pv_vm *``, whose ``map`` and ``pages`` belong to this object. ``ipa_bits`` is the
    size of the guest's physical address space, if the VM does not have the default (40 on arm64).
    """

    def __init__(self, vm: Vm, protection: Protection, native_vm: pv_vm, *, ipa_bits: int | None = None) -> None:
        guard_copies()
        self.protection = protection
        self.native = native_vm
        self.ledger = Ledger(native_vm)
        self.on_evidence: Callable[[Gpa, bool], None] | None = None
        """Under pkvm, called after a guarded access for each page that it informs about: (page, accessible)."""
        self.on_change: Callable[[str, Gpa, int], None] | None = None
        """Called after each change of memory by the VMM: ("slot", "convert" or "punch", gpa, size)."""
        self.quiesce: Callable[[], AbstractContextManager[object]] = nullcontext
        """The context of :meth:`convert`. It should keep the other vCPUs out of the guest while slots move."""
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
        """The current slots, sorted by gpa."""
        return self._table.slots

    @property
    def free_slots(self) -> int:
        """The number of memslots that the kernel still accepts."""
        return self._table.free

    def contains(self, gpa: int, size: int = 1) -> bool:
        """Whether all of ``[gpa, gpa + size)`` is guest memory."""
        return 0 < size == self._table.reach(gpa, size)

    def hva(self, gpa: int, size: int = HOST_PAGE) -> Hva:
        """Return the hva through which KVM faults ``[gpa, gpa + size)`` in, to register with a ``Userfault``.

        Raises UsageError if the range is not whole pages within one piece of one slot.
        """
        parts = self._parts(gpa, size, "find the address of")
        if len(parts) != 1:
            raise UsageError(f"{span(gpa, size)} spans {len(parts)} memory slots of KVM: pass a range within one")
        [(_, piece)] = parts
        return Hva(piece.backing.hva + piece.offset)

    def describe(self, gpa: int) -> str:
        """Describe the state of the page with ``gpa``."""
        return self.ledger.describe(gpa)

    def add(self, gpa: int, backing: Backing, *, offset: int = 0, size: int | None = None) -> Slot:
        """Make ``[gpa, gpa + size)`` guest memory over ``backing`` from ``offset``; ``size`` defaults to the rest.

        From this call on, this memory closes the backing. Raises :class:`UsageError` for arguments that KVM would
        refuse (alignment, overlap, sizes, the number of slots) or accept and fail on later, KvmError for the rest.
        While the guest runs, load the backing before this call: under pkvm and emulated its pages are private at once.
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
            # The ledger first, so that every page that the guest can access has an entry.
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
        """Take over ``backing``, and check as :meth:`add` does that the whole of it could be added at ``gpa``.

        Adds nothing. Parts of it may be added later, at their address in this range.
        """
        with self._changing():
            self._take(gpa, backing.size, backing, 0)

    def remove(self, slot: Slot) -> None:
        """Remove a slot. Its backing stays open until it or this memory is closed.

        A guest access to it then exits with KVM_EXIT_MMIO. Refused once a protected guest has run.
        """
        with self._changing():
            if not any(each is slot for each in self.slots):
                raise UsageError(f"the {slot} is not part of this memory, or was removed")
            if self.protection is Protection.PKVM and self._sealed:
                raise UsageError(
                    f"the {slot} cannot be removed: once a protected guest has run, the kernel refuses to delete or "
                    "move its slots (EPERM), because donated pages return only when the VM ends",
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
        """Apply the protection, just before the first run: from here on pages are private.

        Everything that the guest starts with must be loaded. Idempotent. Under emulated, every page is hidden from the
        host. Under pkvm, the ledger assumes that pages are private, because donations are not reported.
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

        Returns the guest's result: 0, or an SMCCC error. The native loop updates the ledger when it continues.
        """
        if self.protection is not Protection.EMULATED:
            raise UsageError(f"protection {self.protection.value}: only the emulated protection converts in the VMM")
        from pyvmm.memory.conversion import SMCCC_SUCCESS, CopyConversion

        with self.quiesce(), self._changing():
            if self._copies is None:
                self._copies = CopyConversion(self._table, self._own)
            status = self._copies.convert(Gpa(gpa), shared=shared)
            if status == SMCCC_SUCCESS:
                self._tell("convert", Gpa(gpa), HOST_PAGE)
            return status

    def punch(self, gpa: int, size: int, *, unsafe: bool = False) -> None:
        """Drop pages from their backing. The next access, by guest or host, finds zeros, without a report.

        Refused once a protected guest has run, unless ``unsafe``. Donated pages stay pinned, so nothing is freed, and
        host and guest then see different pages. If the range covers only part of a large folio, the kernel zeroes that
        part through its own mapping, which destroys its donated pages.
        """
        with self._changing():
            parts = self._parts(gpa, size, "punch a hole in")
            if self.protection is Protection.PKVM and self._sealed and not unsafe:
                raise UsageError(
                    f"cannot punch a hole in {span(gpa, size)}: a protected guest keeps its donated pages, the "
                    "host would see different pages, and a partly covered huge page would be destroyed",
                    hint="for experiments, unsafe=True does it anyway",
                )
            for slot, piece in parts:
                piece.backing.punch(piece.offset, piece.size)
                self.ledger.fill(slot.area, piece.gpa, piece.size, PageState.HOLE, quiet=not self._sealed)
            self._punched = True
            self._tell("punch", Gpa(gpa), size)

    def populate(self, gpa: int, size: int) -> None:
        """Allocate, zero and map pages on the host's side now, so that the guest's first access costs less.

        Contents stay. Raises HostError if the kernel lacks MADV_POPULATE_WRITE, or memory.
        """
        with self._changing():
            for _, piece in self._parts(gpa, size, "populate"):
                piece.backing.populate(piece.offset, piece.size)

    def load_file(self, gpa: int, fd: int, at: int, size: int) -> int:
        """Read ``size`` bytes at ``at`` of a file straight to ``gpa``, before :meth:`seal`.

        Returns the number of bytes read. Raises OSError if the read fails.
        """
        with self._changing():
            if self._sealed:
                raise UsageError(f"{span(gpa, size)} may be private to the guest: load files before the first run")
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
        """Read ``size`` bytes, never through the kernel. Raises GuestMemoryError if the host may not; no signal."""
        self._check_alive()
        self._check_access(gpa, size)
        # A guest-supplied size must not allocate more than the slots hold.
        data = bytearray(self._table.reach(gpa, size))
        done = lib.pv_read(self.native, gpa, ffi.from_buffer("uint8_t[]", data), len(data), ffi.NULL)
        self._finish("read", gpa, size, done)
        return bytes(data)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data``. On GuestMemoryError its first ``done`` bytes are in guest memory."""
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
        """Whether the host can now read the byte at ``gpa``; False outside of all slots."""
        self._check_alive()
        self._check_access(gpa, 1)
        result = lib.pv_probe(self.native, gpa)
        if result >= 0:
            self._learn(gpa, 1, result > 0)
        return bool(result > 0)

    def locked_report(self) -> str:
        """Return a text: this process's locked memory, and its limit."""
        from pyvmm.memory.memlock import LockedMemory

        try:
            return str(LockedMemory.read())
        except PermissionError:  # a confined run opens no files
            return "how much is locked, this run may not read"

    def close(self) -> None:
        """Close every backing that was added. Idempotent. In a forked child it only closes descriptors."""
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
                f"guest memory of process {self._pid} was used in process {os.getpid()}: a fork does not inherit it, "
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
            raise UsageError(f"cannot {verb} {span(gpa, size)}: both ends must be multiples of {HOST_PAGE:#x}")
        if not self.contains(gpa, size):
            raise UsageError(f"cannot {verb} {span(gpa, size)}: not all of it is guest memory")
        return self._table.pieces(gpa, size)

    def _check_access(self, gpa: int, size: int) -> None:
        if gpa < 0 or size < 0 or gpa + size > 1 << 64:
            raise UsageError(f"{size} bytes at gpa {gpa:#x} are not a valid range of guest physical addresses")

    def _finish(self, verb: str, gpa: int, size: int, done: int) -> None:
        """Evaluate the result of an access, and raise if it was incomplete."""
        error = None
        if done < size:
            stop = gpa + done
            state = self.describe(stop)
            if self.ledger.state(stop) in (PageState.HOST, PageState.SHARED, PageState.HOLE):
                state += " according to the ledger, but not accessible"
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
                # An accessible shared page and an inaccessible unshared page agree with the ledger.
                if (self.ledger.entry(page) == PageState.SHARED) != accessible:
                    hook(Gpa(page), accessible)
        elif self._punched and accessible:
            # The access itself has filled the hole.
            refilled = PageState.HOST if self.protection is Protection.NONE else PageState.SHARED
            for page in pages(gpa, size):
                if self.ledger.state(page) is PageState.HOLE:
                    self.ledger.set(page, refilled)
