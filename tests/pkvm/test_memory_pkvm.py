# SPDX-License-Identifier: Apache-2.0
"""Guest memory with a real arm64 guest: donated, shared, taken back, lazily provided, moved between files."""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyvmm import abi
from pyvmm.errors import GuestMemoryError, HostError, KvmError, UsageError, hex_
from pyvmm.guest.puppet import Puppet
from pyvmm.machine.layout import PRIVATE_BOOT, RAM_BASE
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import Memfd, PrivateGuestMemfd, SharedGuestMemfd
from pyvmm.memory.choices import ConversionPolicy
from pyvmm.memory.ledger import PageState
from pyvmm.memory.memlock import LockedMemory
from pyvmm.memory.memory import Memory
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from tests.pkvm.harness import DEADLINE, Footprint, puppet

pytestmark = pytest.mark.pkvm
PAGE = Gpa(RAM_BASE + PRIVATE_BOOT + 0x10_0000)
BEYOND = Gpa(RAM_BASE + (1 << 30))
isolating = pytest.mark.parametrize("protection", [Protection.PKVM, Protection.EMULATED], ids=lambda p: p.value)
VALUE = 0x1122_3344_5566_7788


@isolating
def test_the_host_cannot_read_a_private_page_and_the_attempt_does_not_harm_it(protection: Protection) -> None:
    with puppet(protection) as (machine, guest):
        guest.write64(PAGE, VALUE)
        memory = machine.memory
        for attempt in (
            lambda: memory.read(PAGE, 8),
            lambda: memory.write(PAGE, bytes(8)),
            lambda: memory.fill(PAGE, HOST_PAGE, 1),
        ):
            with pytest.raises(GuestMemoryError, match=f"gpa {hex_(PAGE)} after 0 bytes: the page is private"):
                attempt()
        assert not memory.probe(PAGE)
        assert guest.read64(PAGE) == VALUE


@isolating
def test_the_host_can_read_a_shared_page_until_the_guest_unshares_it(protection: Protection) -> None:
    with puppet(protection) as (machine, guest):
        memory = machine.memory
        guest.write64(PAGE, VALUE)
        guest.share(PAGE)
        assert memory.ledger.state(PAGE) is PageState.SHARED
        assert memory.read(PAGE, 8) == VALUE.to_bytes(8, "little")
        memory.write(PAGE, (5).to_bytes(8, "little"))
        assert guest.read64(PAGE) == 5
        assert not memory.probe(PAGE + HOST_PAGE) or protection is Protection.PKVM  # untouched: not donated yet
        guest.unshare(PAGE)
        assert memory.ledger.state(PAGE) is PageState.PRIVATE
        assert memory.ledger.assumed(PAGE) == (protection is Protection.PKVM)
        with pytest.raises(GuestMemoryError, match="private to the guest"):
            memory.read(PAGE, 8)
        counts = memory.ledger.counts()
        assert {state: machine.native.pages[state] for state in PageState} == counts


def test_a_read_from_a_shared_page_into_a_donated_one_stops_between_them() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        guest.write64(PAGE + HOST_PAGE, VALUE)
        guest.share(PAGE)
        with pytest.raises(GuestMemoryError) as caught:
            machine.memory.read(PAGE, 2 * HOST_PAGE)
        assert (caught.value.gpa, caught.value.done) == (PAGE + HOST_PAGE, HOST_PAGE)
        assert guest.read64(PAGE + HOST_PAGE) == VALUE


def test_the_next_access_discovers_a_page_that_the_guest_unshared_silently() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        guest.share(PAGE)
        guest.unshare(PAGE, how=abi.SHARE_HVC)
        assert machine.memory.ledger.state(PAGE) is PageState.SHARED
        with pytest.raises(GuestMemoryError, match="shared by the guest according to the ledger, but not accessible"):
            machine.memory.read(PAGE, 1)
        assert machine.memory.ledger.state(PAGE) is PageState.PRIVATE


def test_each_page_that_a_protected_guest_touches_counts_as_locked_memory() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        guest.ping()
        before = LockedMemory.read().locked
        guest.touch(PAGE, 16)
        assert LockedMemory.read().locked - before == 16 * HOST_PAGE
        machine.memory.populate(PAGE, 32 * HOST_PAGE)
        assert LockedMemory.read().locked - before == 16 * HOST_PAGE


def test_populated_pages_are_donated_like_any_other() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        machine.memory.populate(PAGE, 16 * HOST_PAGE)
        guest.write64(PAGE, VALUE)
        assert not machine.memory.probe(PAGE)
        assert guest.read64(PAGE) == VALUE


@pytest.mark.parametrize("protection", list(Protection), ids=lambda p: p.value)
def test_memory_added_while_the_guest_runs_holds_what_was_loaded_before(protection: Protection) -> None:
    with puppet(protection) as (machine, guest):
        late = Memfd(1 << 20)
        late.load(0, VALUE.to_bytes(8, "little"))
        machine.memory.add(BEYOND, late)
        assert guest.read64(BEYOND) == VALUE
        assert machine.memory.probe(BEYOND) == (protection is Protection.NONE)


def test_a_protected_guests_slot_cannot_be_removed_by_pyvmm_or_the_kernel() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        guest.ping()
        with pytest.raises(UsageError, match="EPERM"):
            machine.memory.remove(machine.memory.slots[0])
        with pytest.raises(KvmError, match="EPERM"):
            machine.vm.delete_memory(0)
        assert guest.ping()


def test_pyvmm_refuses_a_hole_under_a_protected_guest_and_a_forced_one_splits_memory() -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        guest.write64(PAGE, VALUE)
        with pytest.raises(UsageError, match="the host would see different pages"):
            machine.memory.punch(PAGE, HOST_PAGE)
        assert not machine.memory.probe(PAGE)
        machine.memory.punch(PAGE, HOST_PAGE, unsafe=True)
        assert machine.memory.read(PAGE, 8) == bytes(8)
        assert guest.read64(PAGE) == VALUE


@pytest.mark.parametrize("kind", [SharedGuestMemfd, PrivateGuestMemfd])
def test_pyvmm_refuses_guest_memfd_for_a_protected_guest_before_the_kernels_eio(
    kind: type[SharedGuestMemfd | PrivateGuestMemfd],
) -> None:
    with puppet(Protection.PKVM) as (machine, guest):
        with pytest.raises(UsageError, match="EIO"):
            machine.memory.add(BEYOND, kind(machine.vm, 1 << 20))
        assert guest.ping()


@pytest.mark.parametrize("backing", ["memfd", "guest_memfd"])
@pytest.mark.parametrize("conversion", list(ConversionPolicy), ids=lambda conversion: conversion.value)
def test_each_conversion_policy_changes_the_contents_as_its_name_says(
    conversion: ConversionPolicy, backing: str
) -> None:
    kept = conversion in (ConversionPolicy.PRESERVE, ConversionPolicy.COPY)
    with puppet(Protection.EMULATED, conversion=conversion, backing=backing) as (machine, guest):
        memory = machine.memory
        guest.write64(PAGE, VALUE)
        guest.share(PAGE)
        assert memory.read(PAGE, 8) == (VALUE if kept else 0).to_bytes(8, "little")
        memory.write(PAGE, (5).to_bytes(8, "little"))
        assert guest.read64(PAGE) == 5
        guest.unshare(PAGE)
        assert not memory.probe(PAGE)
        assert guest.read64(PAGE) == (5 if kept else 0)
        assert guest.unshare(PAGE, how=abi.SHARE_HVC, check=False).status == -3
        assert {state: machine.native.pages[state] for state in PageState} == memory.ledger.counts()


def test_the_copy_policy_shares_out_of_a_private_guest_memfd_by_replacing_the_page() -> None:
    with puppet(Protection.EMULATED, conversion=ConversionPolicy.COPY, backing="private") as (machine, guest):
        memory = machine.memory
        guest.write64(PAGE, VALUE)
        guest.share(PAGE, 3)
        assert memory.read(PAGE, 8) == bytes(8)
        memory.write(PAGE, (5).to_bytes(8, "little"))
        assert guest.read64(PAGE) == 5
        slot = next(slot for slot in memory.slots if slot.gpa <= PAGE < slot.end)
        assert len(slot.pieces) == 3
        guest.unshare(PAGE, 3)
        assert guest.read64(PAGE) == 0
        assert len(slot.pieces) == 1


def test_a_guest_runs_on_when_a_memfd_replaces_its_guest_memfd() -> None:
    with puppet(Protection.NONE) as (machine, guest):
        memory = machine.memory
        slot = memory.add(BEYOND, SharedGuestMemfd(machine.vm, 1 << 20))
        guest.write64(BEYOND, VALUE)
        before = memory.read(BEYOND, 1 << 20)
        memory.remove(slot)
        after = Memfd(1 << 20)
        after.load(0, before)
        memory.add(BEYOND, after)
        assert guest.read64(BEYOND) == VALUE


def test_pyvmm_refuses_a_slot_the_guest_cannot_address_though_the_kernel_takes_it() -> None:
    """Linux 7.3 checks against what the host could give a VM, not against what this VM was given."""
    with puppet(Protection.NONE) as (machine, _):
        backing = Memfd(1 << 20)
        with pytest.raises(UsageError, match="40 bits"):
            machine.memory.add((1 << 40) - HOST_PAGE, backing)
        with pytest.raises(KvmError):
            machine.vm.set_memory(9, (1 << machine.system.max_ipa_bits) - HOST_PAGE, 1 << 20, backing.hva)
        backing.close()


def test_pyvmm_reports_too_little_lockable_memory_before_the_guest_runs() -> None:
    """The child has neither CAP_IPC_LOCK nor CAP_SYS_RESOURCE, and a limit of 64 KiB."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            _drop_capabilities(14, 24)
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
            with puppet(Protection.PKVM):
                pass
        except HostError as error:
            said = error.message
        except BaseException as error:
            said = repr(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert f"{16 << 20} bytes (16 MiB) must be lockable" in said
    assert "the limit is 65536 bytes" in said


def _drop_capabilities(*numbers: int) -> None:
    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    class Data(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    libc = ctypes.CDLL(None, use_errno=True)
    header, data = Header(0x2008_0522, 0), (Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0
    for number in numbers:
        data[0].effective &= ~(1 << number)
    assert libc.capset(ctypes.byref(header), data) == 0


@isolating
def test_slots_can_come_and_go_while_vcpus_share_pages_and_copies_read_them(protection: Protection) -> None:
    with puppet(protection, cpus=3) as (machine, guest):
        memory, pages, many = machine.memory, 8, 60
        guests = [guest.cpu_on(1), guest.cpu_on(2)]
        guest.share(PAGE - HOST_PAGE)
        guest.write64(PAGE - HOST_PAGE, VALUE)
        stop, wrong = threading.Event(), []

        def reader() -> None:
            while not stop.is_set():
                if memory.read(PAGE - HOST_PAGE, 8) != VALUE.to_bytes(8, "little"):
                    wrong.append(1)

        def sharer(each: Puppet, start: int) -> None:
            while not stop.is_set():
                each.share(start, pages)
                each.unshare(start, pages)

        with ThreadPoolExecutor(4) as pool:
            working = [pool.submit(reader)]
            working += [pool.submit(sharer, each, PAGE + at * 16 * HOST_PAGE) for at, each in enumerate(guests)]
            try:
                files = [Memfd(many * HOST_PAGE), Memfd(HOST_PAGE)]
                for index in range(many):
                    gpa = BEYOND + 2 * index * HOST_PAGE
                    memory.add(gpa, files[0], offset=index * HOST_PAGE, size=HOST_PAGE)
                    if protection is not Protection.PKVM:
                        memory.remove(memory.add(gpa + HOST_PAGE, files[1]))
            finally:
                stop.set()
            for each in working:
                each.result(DEADLINE)
        assert wrong == []
        assert machine.native.map.count == many + 1
        assert machine.native.shares >= 2 * pages
        assert {state: machine.native.pages[state] for state in PageState} == memory.ledger.counts()


def test_guest_memory_leaves_nothing_behind() -> None:
    with puppet(Protection.EMULATED, conversion=ConversionPolicy.COPY) as (_, guest):
        guest.ping()
    before = Footprint.now()
    ways: list[tuple[Protection, dict[str, object]]] = [
        (Protection.PKVM, {}),
        (Protection.EMULATED, {"conversion": ConversionPolicy.COPY}),
        (Protection.EMULATED, {"conversion": ConversionPolicy.COPY, "backing": "private"}),
        (Protection.NONE, {"backing": "guest_memfd"}),
    ]
    for protection, more in ways:
        with puppet(protection, **more) as (machine, guest):
            guest.touch(PAGE, 8)
            if protection.isolates:
                guest.share(PAGE, 4)
            assert isinstance(machine.memory, Memory)
        assert Footprint.now() == before
