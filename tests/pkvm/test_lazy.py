# SPDX-License-Identifier: Apache-2.0
"""Guest memory served at first touch by userfaultfd: which guests' faults can wait for an answer, and which cannot."""

from __future__ import annotations

import errno
import threading

import pytest

from pyvmm import abi
from pyvmm.guest.orders import GuestSilent
from pyvmm.machine.layout import PRIVATE_BOOT, RAM_BASE
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import Memfd, SharedGuestMemfd
from pyvmm.memory.fault_server import Answer, Server
from pyvmm.memory.userfault import Fault, FaultKind, Userfault, UserfaultError
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.uapi.userfaultfd import UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_RWPROTECT, UFFDIO_WRITEPROTECT
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import DEADLINE, Footprint, puppet

pytestmark = pytest.mark.pkvm
PAGE = Gpa(RAM_BASE + PRIVATE_BOOT + 0x10_0000)
BEYOND = Gpa(RAM_BASE + (1 << 30))
SIZE = 16 * HOST_PAGE
VALUE = 0x1122_3344_5566_7788
waiting = pytest.mark.parametrize("protection", [Protection.NONE, Protection.EMULATED], ids=lambda p: p.value)


def contents(gpa: int) -> bytes:
    """Return a page that contains its own address."""
    return gpa.to_bytes(8, "little") * (HOST_PAGE // 8)


@waiting
def test_a_callback_fills_missing_pages_when_the_guest_touches_them(protection: Protection) -> None:
    with puppet(protection) as (machine, guest), Userfault.open() as userfault:
        start = machine.memory.hva(PAGE, SIZE)
        asked: list[Fault] = []

        def resolve(fault: Fault) -> bytes | Answer:
            asked.append(fault)
            gpa = PAGE + fault.page - start
            return Answer.ZERO if gpa == PAGE + HOST_PAGE else contents(gpa)

        allowed = userfault.register(start, SIZE, missing=True)
        assert UFFDIO_COPY in allowed
        assert not {UFFDIO_CONTINUE, UFFDIO_WRITEPROTECT, UFFDIO_RWPROTECT} & allowed
        with Server(userfault, resolve) as server:
            assert guest.read64(PAGE) == PAGE
            assert guest.read64(PAGE + HOST_PAGE) == 0
            guest.write64(PAGE + 2 * HOST_PAGE, VALUE)
            assert guest.words(PAGE + 2 * HOST_PAGE, 2) == (VALUE, PAGE + 2 * HOST_PAGE)
            assert guest.read64(PAGE) == PAGE
            assert server.served == {FaultKind.MISSING: 3}
        assert [fault.page - start for fault in asked] == [0, HOST_PAGE, 2 * HOST_PAGE]
        assert asked[2].write
        # KVM faults in the vCPU's own thread.
        assert len({fault.tid for fault in asked}) == 1
        assert asked[0].tid not in (None, 0, threading.get_native_id())


@waiting
def test_minor_faults_map_what_another_mapping_has_put_into_the_file(protection: Protection) -> None:
    with puppet(protection) as (machine, guest), Userfault.open() as userfault:
        file = Memfd(SIZE)
        file.separate_view()
        file.load(0, contents(BEYOND))
        machine.memory.add(BEYOND, file)
        assert UFFDIO_CONTINUE in userfault.register(machine.memory.hva(BEYOND, SIZE), SIZE, minor=True)
        with Server(userfault, lambda _fault: Answer.CONTINUE) as server:
            assert guest.read64(BEYOND) == BEYOND
            guest.write64(BEYOND, VALUE)
            assert guest.read64(BEYOND) == VALUE
            assert server.served == {FaultKind.MINOR: 1}
            # A page that the file does not have is missing. Missing faults were not requested.
            assert guest.read64(BEYOND + HOST_PAGE) == 0
            assert server.served == {FaultKind.MINOR: 1}


@waiting
def test_write_protection_reports_stores_and_not_loads(protection: Protection) -> None:
    with puppet(protection) as (machine, guest), Userfault.open() as userfault:
        guest.write64(PAGE, VALUE)
        start = machine.memory.hva(PAGE, SIZE)
        assert UFFDIO_WRITEPROTECT in userfault.register(start, SIZE, wp=True)
        userfault.write_protect(start, 2 * HOST_PAGE)
        with Server(userfault, lambda _fault: Answer.UNPROTECT) as server:
            assert guest.read64(PAGE) == VALUE
            guest.write64(PAGE + 2 * HOST_PAGE, 1)
            assert not server.served
            guest.write64(PAGE, 2)
            guest.write64(PAGE, 3)
            assert server.served == {FaultKind.WP: 1}
            # In shared memory, pages that do not exist yet are protected too.
            guest.write64(PAGE + HOST_PAGE, 4)
            assert server.served == {FaultKind.WP: 2}
        assert guest.read64(PAGE) == 3


@waiting
def test_read_write_protection_reports_the_next_access_to_mapped_pages(protection: Protection) -> None:
    with puppet(protection) as (machine, guest), Userfault.open() as userfault:
        guest.write64(PAGE, VALUE)
        guest.write64(PAGE + HOST_PAGE, VALUE)
        start = machine.memory.hva(PAGE, SIZE)
        assert UFFDIO_RWPROTECT in userfault.register(start, SIZE, rwp=True)
        userfault.rwprotect(start, SIZE)
        asked: list[Fault] = []

        def unprotect(fault: Fault) -> Answer:
            asked.append(fault)
            return Answer.UNPROTECT

        with Server(userfault, unprotect) as server:
            assert guest.read64(PAGE) == VALUE
            guest.write64(PAGE + HOST_PAGE, 1)
            assert server.served == {FaultKind.RWP: 2}
            assert [fault.write for fault in asked] == [False, True]
            guest.write64(PAGE, 2)
            # Unlike write protection this does not protect pages that are not mapped.
            guest.write64(PAGE + 2 * HOST_PAGE, 3)
            assert server.served == {FaultKind.RWP: 2}
            userfault.rwprotect(start, HOST_PAGE)
            assert guest.read64(PAGE) == 2
            assert server.served == {FaultKind.RWP: 3}


def test_vcpus_that_touch_the_same_pages_at_once_get_the_same_contents() -> None:
    with puppet(Protection.NONE, cpus=4) as (machine, guest), Userfault.open() as userfault:
        guests = [guest, *(guest.cpu_on(index) for index in (1, 2, 3))]
        start = machine.memory.hva(PAGE, 64 * HOST_PAGE)
        userfault.register(start, 64 * HOST_PAGE, missing=True)
        with Server(userfault, lambda fault: contents(PAGE + fault.page - start)) as server:
            sums = [each.start(abi.OP_SUM, PAGE, 64 * HOST_PAGE) for each in guests]
            expected = sum((PAGE + index * HOST_PAGE) * (HOST_PAGE // 8) for index in range(64)) % 2**64
            assert [each.result()[0] for each in sums] == [expected] * 4
        # Check after the end: a late fault may have been on its way when the guest already had its page.
        assert server.served[FaultKind.MISSING] - server.late == 64


def test_a_vcpu_waits_until_its_fault_is_answered_or_the_userfault_is_closed() -> None:
    with puppet(Protection.NONE) as (machine, guest):
        with Userfault.open() as userfault:
            userfault.register(machine.memory.hva(PAGE, SIZE), SIZE, missing=True)
            order = guest.start_read64(PAGE)
            assert userfault.wait(DEADLINE)
            [thread] = machine._threads
            thread.pause()
            assert not thread.wait_paused(0.5)  # a kick does not reach it there
        assert thread.wait_paused(DEADLINE)
        thread.resume()
        assert order.result() == 0


def test_a_callback_that_fails_leaves_the_guest_waiting_and_its_error_is_raised() -> None:
    heard: list[BaseException] = []
    with puppet(Protection.NONE) as (machine, guest), Userfault.open() as userfault:
        userfault.register(machine.memory.hva(PAGE, SIZE), SIZE, missing=True)

        def serve() -> None:
            nothing: dict[int, bytes] = {}
            with Server(userfault, lambda _fault: nothing[5], failed=heard.append) as server:
                with pytest.raises(GuestSilent):
                    order.result(0.3)
                assert (server.failures, server.served.total()) == (1, 0)

        order = guest.start_read64(PAGE)
        with pytest.raises(KeyError):
            serve()
        assert [type(error) for error in heard] == [KeyError]


@pytest.mark.parametrize("mode", ["missing", "minor", "wp", "rwp"])
def test_a_protected_guests_faults_cannot_wait_so_its_vcpu_fails_with_efault(mode: str) -> None:
    with puppet(Protection.PKVM) as (machine, guest), Userfault.open() as userfault:
        file = Memfd(SIZE)
        if mode == "minor":
            file.separate_view()
        if mode != "missing":
            file.load(0, contents(BEYOND))
        machine.memory.add(BEYOND, file)
        start = machine.memory.hva(BEYOND, SIZE)
        userfault.register(start, SIZE, **{mode: True})
        if mode in ("wp", "rwp"):
            (userfault.write_protect if mode == "wp" else userfault.rwprotect)(start, SIZE)
        with Server(userfault, lambda _fault: Answer.UNPROTECT) as server:
            guest.start_read64(BEYOND)
            outcome = machine.wait(DEADLINE)
            assert not server.served
        assert outcome.ending is Ending.CRASH
        assert "KVM_RUN(vcpu=0): EFAULT" in outcome.reason


def test_a_guest_memfd_reports_no_faults() -> None:
    with puppet(Protection.NONE) as (machine, _), Userfault.open() as userfault:
        machine.memory.add(BEYOND, SharedGuestMemfd(machine.vm, SIZE))
        with pytest.raises(UserfaultError, match="EINVAL: part of it is not mapped memfd") as caught:
            userfault.register(machine.memory.hva(BEYOND, SIZE), SIZE, missing=True)
        assert caught.value.errno == errno.EINVAL


def test_serving_faults_leaves_nothing_behind() -> None:
    with puppet(Protection.NONE) as (_, guest):
        guest.ping()
    before = Footprint.now()
    with puppet(Protection.EMULATED) as (machine, guest), Userfault.open() as userfault:
        userfault.register(machine.memory.hva(PAGE, SIZE), SIZE, missing=True)
        with Server(userfault, lambda _fault: Answer.ZERO):
            guest.touch(PAGE, 16)
    assert Footprint.now() == before
