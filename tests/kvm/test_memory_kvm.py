# SPDX-License-Identifier: Apache-2.0
"""Guest memory on the real /dev/kvm: how the kernel treats pyvmm's slots, files and holes, seen by a guest.

The guest is eight bytes of 16-bit x86 code: tests with a guest need x86. On arm64 tests/pkvm use the puppet.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvmm._native import ffi, lib
from pyvmm.errors import GuestMemoryError, KvmError, PyvmmError, UsageError
from pyvmm.kvm.system import System
from pyvmm.kvm.vm import Vm
from pyvmm.memory.backing import Backing, Memfd, PrivateGuestMemfd, SharedGuestMemfd
from pyvmm.memory.ledger import PageState
from pyvmm.memory.memory import Memory
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.uapi.kvm_cap import KVM_CAP_GUEST_MEMFD_FLAGS
from pyvmm.uapi.kvm_x86 import kvm_regs

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm that we may open"),
]
needs_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the guest is x86 code; the puppet does it on arm64"
)

CODE = 0x1000
LOAD, STORE = CODE, CODE + 0x10
DATA = 0x4000
PAGES = 8
SIZE = PAGES * HOST_PAGE
KVM_EXIT_HLT = 5
KVM_EXIT_MEMORY_FAULT = 39


class Guest:
    """A VM with a page of code and, once ``add`` was called, data at DATA; loads and stores bytes when told."""

    def __init__(self, protection: Protection = Protection.NONE) -> None:
        self.system = System.open()
        self.vm: Vm = self.system.create_vm()
        self.native = ffi.new("struct pv_vm *", {"fd": self.vm.fileno()})
        self.native.protection = {Protection.NONE: lib.PV_NONE, Protection.EMULATED: lib.PV_EMULATED}[protection]
        self.memory = Memory(self.vm, protection, self.native)
        self.cpu: Any = None  # a struct pv_vcpu * once it was started

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.system.close()
        self.memory.close()

    def add(self, backing: Backing) -> Guest:
        self.memory.add(DATA, backing)
        return self

    def start(self) -> None:
        self.memory.add(CODE, Memfd(HOST_PAGE))
        self.memory.write(LOAD, bytes.fromhex("8a07 f4"))  # mov (%bx),%al; hlt
        self.memory.write(STORE, bytes.fromhex("8807 f4"))  # mov %al,(%bx); hlt
        self.memory.seal()
        self.vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        for segment in (sregs.cs, sregs.ds):
            segment.base = segment.selector = 0
        self.vcpu.set_sregs(sregs)
        self.cpu = ffi.new("struct pv_vcpu *", {"fd": self.vcpu.fileno(), "vm": self.native})
        self.cpu.run = ffi.cast("void *", self.vcpu.run_address)

    def run(self, code: int, gpa: int, value: int = 0) -> int:
        """Return why the loop stopped; PV_STOP_OTHER with KVM_EXIT_HLT when the guest is done."""
        if self.cpu is None:
            self.start()
        assert self.cpu is not None
        self.vcpu.set_regs(kvm_regs(rip=code, rbx=gpa, rax=value, rflags=2))
        return lib.pv_run(self.cpu)

    def load(self, gpa: int) -> int:
        self._done(self.run(LOAD, gpa))
        return self.vcpu.get_regs().rax & 0xFF

    def store(self, gpa: int, value: int) -> None:
        self._done(self.run(STORE, gpa, value))

    def _done(self, stop: int) -> None:
        assert (stop, self.cpu.exit_reason) == (lib.PV_STOP_OTHER, KVM_EXIT_HLT), (stop, self.cpu.error)


GuestMemfdKind = type[SharedGuestMemfd | PrivateGuestMemfd]


def shared_guest_memfd(vm: Vm) -> Backing:
    return _guest_memfd(SharedGuestMemfd, vm)


def private_guest_memfd(vm: Vm) -> Backing:
    return _guest_memfd(PrivateGuestMemfd, vm)


def _guest_memfd(kind: GuestMemfdKind, vm: Vm) -> Backing:
    if vm.system.check(KVM_CAP_GUEST_MEMFD_FLAGS) & 3 != 3:
        pytest.skip("this kernel's guest_memfd cannot be mapped")
    return kind(vm, SIZE)


def memfd(_: Vm) -> Backing:
    return Memfd(SIZE)


Make = Callable[[Vm], Backing]
READABLE = pytest.mark.parametrize("make", [memfd, shared_guest_memfd])
EVERY = pytest.mark.parametrize("make", [memfd, shared_guest_memfd, private_guest_memfd])


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as guest:
        yield guest


@pytest.fixture
def emulated() -> Iterator[Guest]:
    with Guest(Protection.EMULATED) as guest:
        yield guest


# ---- slots, on any architecture


def test_the_kernel_refuses_with_an_errno_what_pyvmm_refuses_with_a_message(guest: Guest) -> None:
    guest.add(Memfd(SIZE))
    backing = Memfd(SIZE)
    with backing:
        for gpa, size, code in [
            (DATA + HOST_PAGE, HOST_PAGE, errno.EEXIST),
            (DATA + SIZE + 1, HOST_PAGE, errno.EINVAL),
        ]:
            with pytest.raises(UsageError):
                guest.memory.add(gpa, backing, size=size)
            with pytest.raises(KvmError) as caught:
                guest.vm.set_memory(100, gpa, size, backing.hva)
            assert caught.value.errno == code


def test_the_kernel_takes_every_backing_and_slot_numbers_can_be_reused(guest: Guest) -> None:
    for make in (memfd, shared_guest_memfd, private_guest_memfd):
        for _ in range(2):
            with make(guest.vm) as backing:
                guest.memory.remove(guest.memory.add(DATA, backing))
                guest.vm.set_memory(0, DATA, SIZE, spare_hva(guest))
                guest.vm.delete_memory(0)


def spare_hva(guest: Guest) -> int:
    spare = Memfd(SIZE)
    guest.memory._own(spare)
    return spare.hva


def test_a_guest_memfd_belongs_to_one_slot_at_a_time(guest: Guest) -> None:
    backing = shared_guest_memfd(guest.vm)
    guest.add(backing)
    with pytest.raises(UsageError, match="already"):
        guest.memory.add(DATA + SIZE, backing)


def test_the_host_cannot_read_a_private_guest_memfd_and_pyvmm_says_so(guest: Guest) -> None:
    guest.add(private_guest_memfd(guest.vm))
    assert guest.memory.ledger.state(DATA) is PageState.PRIVATE
    assert not guest.memory.probe(DATA)
    with pytest.raises(GuestMemoryError, match="private to the guest"):
        guest.memory.write(DATA, b"x")
    with pytest.raises(GuestMemoryError, match="not accessible to the host"):
        guest.memory.slots[0].backing.load(0, b"x")


def test_pyvmm_refuses_a_guest_memfd_in_a_protected_vm_before_the_kernels_eio(guest: Guest) -> None:
    memory = Memory(guest.vm, Protection.PKVM, ffi.new("struct pv_vm *"))
    with memory, pytest.raises(UsageError, match="EIO"):
        memory.add(DATA, shared_guest_memfd(guest.vm))


def test_a_guest_memfd_can_be_closed_after_its_vm(guest: Guest) -> None:
    backing = shared_guest_memfd(guest.vm)
    guest.add(backing)
    guest.vm.close()
    assert backing.guest_memfd is not None
    assert backing.guest_memfd.closed
    guest.memory.close()
    assert backing.closed


def unevictable() -> int:
    """Return the bytes the kernel cannot reclaim. Only this counter includes guest_memfd pages."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Unevictable:"))


@pytest.mark.parametrize("kind", [SharedGuestMemfd, PrivateGuestMemfd])
def test_populating_a_guest_memfd_allocates_its_pages_and_punching_frees_them(
    guest: Guest, kind: GuestMemfdKind
) -> None:
    private_guest_memfd(guest.vm).close()
    size = 64 << 20
    guest.add(kind(guest.vm, size))
    before = unevictable()
    guest.memory.populate(DATA, size)
    assert unevictable() - before > size * 3 // 4
    guest.memory.punch(DATA, size)
    assert unevictable() - before < size // 4


def test_nothing_leaks_whatever_the_order_in_which_a_vm_is_closed() -> None:
    def usage() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            files = sum("guest" in line or "kvm" in line or "---p" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), files

    with Guest() as warm:
        warm.add(Memfd(SIZE))
    before = usage()
    for protection in (Protection.NONE, Protection.EMULATED):
        for memory_first in (False, True):
            for built in range(4):
                guest = Guest(protection)
                for index, make in enumerate([memfd, shared_guest_memfd, private_guest_memfd][:built]):
                    guest.memory.add(DATA + index * SIZE, make(guest.vm))
                with pytest.raises(PyvmmError):
                    guest.memory.add(DATA + 1, Memfd(SIZE))
                guest.memory.seal()
                if memory_first:
                    guest.memory.close()
                guest.system.close()
                guest.memory.close()
    assert usage() == before


# ---- with a guest


@pytest.fixture
def private_pages() -> None:
    """Skip if KVM finds even guest_memfd pages through the host's mapping, as some nested hosts do."""
    with Guest() as guest:
        guest.add(private_guest_memfd(guest.vm))
        if guest.run(LOAD, DATA) != lib.PV_STOP_OTHER:
            pytest.skip("this KVM reads a guest_memfd through the host's mapping, which is closed if it is private")


def needs_private_pages(request: pytest.FixtureRequest, make: object) -> None:
    if make is private_guest_memfd:
        request.getfixturevalue("private_pages")


@needs_x86
@READABLE
def test_guest_and_host_see_each_others_stores(guest: Guest, make: Make) -> None:
    guest.add(make(guest.vm))
    guest.memory.write(DATA + 5, b"\x2a")
    assert guest.load(DATA + 5) == 0x2A
    guest.store(DATA + HOST_PAGE, 7)
    assert guest.memory.read(DATA + HOST_PAGE, 1) == b"\7"


@needs_x86
@pytest.mark.usefixtures("private_pages")
def test_the_guest_uses_a_private_guest_memfd_as_memory(guest: Guest) -> None:
    guest.add(private_guest_memfd(guest.vm))
    guest.store(DATA, 7)
    assert guest.load(DATA) == 7
    assert not guest.memory.probe(DATA)


@needs_x86
@EVERY
def test_the_guest_reads_zeros_from_a_hole_without_an_exit(
    guest: Guest, make: Make, request: pytest.FixtureRequest
) -> None:
    needs_private_pages(request, make)
    guest.add(make(guest.vm))
    guest.store(DATA, 7)
    guest.store(DATA + HOST_PAGE, 8)
    guest.memory.punch(DATA, HOST_PAGE)
    assert guest.load(DATA) == 0
    assert guest.load(DATA + HOST_PAGE) == 8


@needs_x86
def test_accesses_to_a_removed_slot_exit_until_a_new_slot_takes_its_place(guest: Guest) -> None:
    guest.add(Memfd(SIZE))
    guest.store(DATA, 7)
    guest.memory.remove(guest.memory.slots[-1])
    assert guest.run(LOAD, DATA + 3) == lib.PV_STOP_UNCLAIMED
    assert (guest.cpu.gpa, guest.cpu.is_write) == (DATA + 3, 0)
    lib.pv_mmio_reply(guest.cpu, 0x55)
    guest._done(lib.pv_run(guest.cpu))
    assert guest.vcpu.get_regs().rax & 0xFF == 0x55
    late = Memfd(SIZE)
    late.load(0, b"\x66")
    guest.add(late)
    assert guest.load(DATA) == 0x66


@needs_x86
@pytest.mark.usefixtures("private_pages")
def test_pyvmm_reports_a_removed_guest_memfd_and_a_memfd_can_replace_it(guest: Guest) -> None:
    backing = shared_guest_memfd(guest.vm)
    guest.add(backing)
    guest.store(DATA, 7)
    slot = guest.memory.slots[-1]
    backing.close()
    assert guest.run(LOAD, DATA) == lib.PV_STOP_FAILED
    assert (guest.cpu.failure, guest.cpu.exit_reason) == (lib.PV_FAIL_MEMORY, KVM_EXIT_MEMORY_FAULT)
    assert (guest.cpu.error, guest.cpu.fault_gpa, guest.cpu.fault_size) == (errno.EFAULT, DATA, HOST_PAGE)
    guest.memory.remove(slot)
    spare = Memfd(SIZE)
    spare.load(0, b"\x2a")
    guest.add(spare)
    guest._done(lib.pv_run(guest.cpu))
    assert guest.vcpu.get_regs().rax & 0xFF == 0x2A


@needs_x86
@EVERY
def test_the_emulated_protection_keeps_the_host_out_and_lets_the_guest_run(
    emulated: Guest, make: Make, request: pytest.FixtureRequest
) -> None:
    needs_private_pages(request, make)
    emulated.add(make(emulated.vm))
    emulated.store(DATA, 7)
    assert emulated.load(DATA) == 7
    assert emulated.memory.ledger.state(DATA) is PageState.PRIVATE
    with pytest.raises(GuestMemoryError, match="private to the guest"):
        emulated.memory.read(DATA, 1)


@needs_x86
@READABLE
def test_a_page_copied_out_and_back_has_the_stores_of_both_sides(emulated: Guest, make: Make) -> None:
    emulated.add(make(emulated.vm))
    page = DATA + 2 * HOST_PAGE
    emulated.store(page - 1, 1)
    emulated.store(page, 7)
    assert emulated.memory.convert(page, True) == 0
    assert emulated.memory.read(page, 1) == b"\7"
    emulated.memory.write(page + 1, b"\x2a")
    assert (emulated.load(page), emulated.load(page + 1), emulated.load(page - 1)) == (7, 0x2A, 1)
    emulated.store(page + 2, 3)
    assert emulated.memory.read(page + 2, 1) == b"\3"
    assert emulated.memory.convert(page, False) == 0
    assert [emulated.load(page + offset) for offset in range(3)] == [7, 0x2A, 3]
    assert not emulated.memory.probe(page)


@needs_x86
@pytest.mark.usefixtures("private_pages")
def test_a_page_the_host_cannot_read_becomes_zeros_in_both_directions(emulated: Guest) -> None:
    emulated.add(private_guest_memfd(emulated.vm))
    emulated.store(DATA, 7)
    emulated.store(DATA + HOST_PAGE, 8)
    assert emulated.memory.convert(DATA, True) == 0
    assert emulated.memory.read(DATA, 1) == b"\0"
    emulated.memory.write(DATA, b"\x2a")
    assert emulated.load(DATA) == 0x2A
    assert emulated.memory.convert(DATA, False) == 0
    assert emulated.load(DATA) == 0
    assert emulated.load(DATA + HOST_PAGE) == 8
    assert not emulated.memory.probe(DATA)


@needs_x86
@READABLE
def test_every_second_page_shared_and_taken_back_leaves_one_slot(emulated: Guest, make: Make) -> None:
    emulated.add(make(emulated.vm))
    for number in range(PAGES):
        emulated.store(DATA + number * HOST_PAGE, number + 1)
    for number in range(0, PAGES, 2):
        assert emulated.memory.convert(DATA + number * HOST_PAGE, True) == 0
    assert [emulated.load(DATA + number * HOST_PAGE) for number in range(PAGES)] == list(range(1, PAGES + 1))
    for number in range(0, PAGES, 2):
        assert emulated.memory.convert(DATA + number * HOST_PAGE, False) == 0
    assert [emulated.load(DATA + number * HOST_PAGE) for number in range(PAGES)] == list(range(1, PAGES + 1))
    assert len(emulated.memory.slots[-1].pieces) == 1
