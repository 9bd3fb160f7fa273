# SPDX-License-Identifier: Apache-2.0
"""Memory on demand with real guests: slots added at the first access, in all three protections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm import abi
from pyvmm.errors import GuestMemoryError
from pyvmm.guest.orders import Access, GuestFault, Order, Results
from pyvmm.guest.puppet import Puppet
from pyvmm.machine.machine import Machine
from pyvmm.memory.ledger import PageState
from pyvmm.memory.memlock import LockedMemory
from pyvmm.memory.on_demand import OnDemand
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, DEADLINE, Footprint, config

pytestmark = pytest.mark.pkvm
everywhere = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)
START = 0x2000_0000
SIZES = (1, 2, 4, 8)
VALUE = 0xA1A2_A3A4_A5A6_A7A8


def contents(gpa: int, size: int) -> bytes:
    """Return a page whose first word is its address; the rest counts up."""
    page = bytes(range(256)) * (HOST_PAGE // 256)
    return b"".join(at.to_bytes(8, "little") + page[8:] for at in range(gpa, gpa + size, HOST_PAGE))


@contextlib.contextmanager
def lazy_puppet(
    protection: Protection, *, granule: int = HOST_PAGE, size: int = 1 << 20, cpus: int = 1, **options: Any
) -> Iterator[tuple[Machine, OnDemand, list[Puppet]]]:
    lazy = OnDemand([(START, size)], granule=granule, **{"fill": contents, **options})
    with Machine(config("payload:puppet", protection, cpus=cpus), unclaimed=lazy) as machine:
        lazy.attach(machine.memory)
        machine.start()
        try:
            guest = Puppet(machine.mailboxes)
            yield machine, lazy, [guest, *(guest.cpu_on(index) for index in range(1, cpus))]
        finally:
            machine.stop("the test is over")
            machine.wait(DEADLINE)


@everywhere
def test_the_first_load_and_store_of_any_width_act_as_if_memory_was_already_there(
    protection: Protection,
) -> None:
    with lazy_puppet(protection) as (_, lazy, [guest]):
        page = START
        for size in SIZES:
            for offset in (8, 248, HOST_PAGE - size):
                expected = int.from_bytes(contents(page, HOST_PAGE)[offset : offset + size], "little")
                assert guest.timed_read(page + offset, size).value == expected
                page += HOST_PAGE
                guest.write(page + offset, VALUE, size)
                whole = bytearray(contents(page, HOST_PAGE))
                whole[offset : offset + size] = VALUE.to_bytes(8, "little")[:size]
                around = max(0, offset // 8 * 8 - 8)
                count = min(3, (HOST_PAGE - around) // 8)
                words = b"".join(word.to_bytes(8, "little") for word in guest.words(page + around, count))
                assert words == whole[around : around + 8 * count]
                page += HOST_PAGE
        assert lazy.slots == (page - START) // HOST_PAGE == 24
        assert (lazy.late, lazy.refused) == (0, 0)


@everywhere
def test_accesses_across_two_pages_work_whichever_of_them_is_missing(protection: Protection) -> None:
    with lazy_puppet(protection) as (_, lazy, [guest]):
        both = contents(START, 16 * HOST_PAGE)
        for index, (before, store) in enumerate((b, s) for b in ((), (0,), (1,)) for s in (False, True)):
            first = START + 2 * index * HOST_PAGE
            for there in before:
                guest.read64(first + there * HOST_PAGE)
            gpa = first + HOST_PAGE - 3
            if store:
                guest.write64(gpa, VALUE)
                assert guest.read64(gpa) == VALUE
                assert guest.read8(gpa - 1) == both[gpa - 1 - START]
                assert guest.read8(gpa + 8) == both[gpa + 8 - START]
            else:
                assert guest.read64(gpa) == int.from_bytes(both[gpa - START : gpa + 8 - START], "little")
        assert lazy.slots == 12


@everywhere
def test_a_page_added_on_demand_is_as_protected_as_any(protection: Protection) -> None:
    with lazy_puppet(protection, granule=4 * HOST_PAGE) as (machine, _, [guest]):
        memory = machine.memory
        guest.ping()
        locked = LockedMemory.read().locked
        guest.write64(START + 8, VALUE)
        assert guest.words(START, 2) == (START, VALUE)
        if protection is Protection.PKVM:
            assert LockedMemory.read().locked - locked == HOST_PAGE  # donated: one of the granule's four
        if protection.isolates:
            assert memory.ledger.state(START) is PageState.PRIVATE
            with pytest.raises(GuestMemoryError, match="private to the guest"):
                memory.read(START, 8)
            guest.share(START)
        assert memory.read(START + 8, 8) == VALUE.to_bytes(8, "little")
        assert guest.read64(START + 3 * HOST_PAGE) == START + 3 * HOST_PAGE


@everywhere
@pytest.mark.parametrize("cpus", [1, 4])
def test_vcpus_that_race_for_the_same_granules_see_one_memory(protection: Protection, cpus: int) -> None:
    granules, granule = 24, 2 * HOST_PAGE
    with lazy_puppet(protection, granule=granule, cpus=cpus) as (_, lazy, guests):
        # Each vCPU has 8 bytes of each granule to store to, in widths and pages that differ, and all load one word.
        def place(index: int, cpu: int) -> tuple[int, int]:
            size = SIZES[(index + cpu) % 4]
            return START + index * granule + (index + cpu) % 2 * HOST_PAGE + 64 + 16 * cpu, size

        for index in range(granules):
            orders: list[tuple[Order[Results], int | None]] = []
            for cpu, guest in enumerate(guests):
                gpa, size = place(index, cpu)
                if (index + cpu) % 3 == 0:
                    orders.append((guest.start(abi.OP_READ, START + index * granule, 8), START + index * granule))
                else:
                    orders.append((guest.start(abi.OP_WRITE, gpa, size, VALUE + cpu), None))
            for order, word in orders:
                got = order.result()[0]
                assert word in (None, got)
        assert lazy.slots == granules
        for index in range(granules):
            expected = bytearray(contents(START + index * granule, granule))
            for cpu in range(cpus):
                gpa, size = place(index, cpu)
                if (index + cpu) % 3:
                    at = gpa - START - index * granule
                    expected[at : at + size] = (VALUE + cpu).to_bytes(8, "little")[:size]
            for page in (0, HOST_PAGE):
                words = guests[-1].words(START + index * granule + page, 24)
                assert b"".join(word.to_bytes(8, "little") for word in words) == expected[page : page + 24 * 8]


@everywhere
def test_four_vcpus_fill_and_sum_a_range_that_is_entirely_missing(protection: Protection) -> None:
    pages = 256
    with lazy_puppet(protection, granule=HOST_PAGE, cpus=4, limit=pages) as (_, lazy, guests):
        touches = [
            guest.start_touch(START, pages, seed=cpu + 1, access=Access.READ if cpu % 2 else Access.WRITE)
            for cpu, guest in enumerate(guests)
        ]
        assert [each.result().pages for each in touches] == [pages] * 4
        assert lazy.slots == pages
        quarters = [
            guest.start(abi.OP_FILL, START + cpu * pages * 1024, pages * 1024, cpu + 1)
            for cpu, guest in enumerate(guests)
        ]
        for each in quarters:
            each.result()
        total = sum((cpu + 1) * pages * 1024 // 8 for cpu in range(4))
        assert [guest.sum(START, pages * HOST_PAGE) for guest in guests] == [total] * 4


@everywhere
def test_a_guest_that_exceeds_its_limit_gets_an_abort_and_keeps_its_memory(protection: Protection) -> None:
    with lazy_puppet(protection, limit=2) as (machine, lazy, [guest]):
        assert guest.read64(START) == START
        guest.write64(START + HOST_PAGE, VALUE)
        for _ in range(3):
            with pytest.raises(GuestFault, match="external abort"):
                guest.read64(START + 2 * HOST_PAGE)
        assert (lazy.slots, lazy.refused) == (2, 3)
        assert (guest.read64(START), guest.read64(START + HOST_PAGE)) == (START, VALUE)
        with pytest.raises(GuestFault):
            guest.read64(START - 8)
        assert lazy.refused == 3
        assert len(machine.memory.slots) == 3


@everywhere
def test_an_exception_from_fill_ends_the_run_and_the_reason_says_so(protection: Protection) -> None:
    def fill(gpa: int, _size: int) -> bytes:
        raise OSError(f"the snapshot has no page {gpa:#x}")

    with lazy_puppet(protection, fill=fill) as (machine, _, [guest]):
        guest.start_read64(START)
        outcome = machine.wait(DEADLINE)
        assert outcome.ending is Ending.FAILED
        assert "the snapshot has no page 0x20000000" in outcome.reason


def test_a_protected_guest_grows_by_a_thousand_pages_one_by_one() -> None:
    with lazy_puppet(Protection.PKVM, size=1000 * HOST_PAGE, limit=1000) as (machine, lazy, [guest]):
        assert guest.start_touch(START, 1000).result(10 * DEADLINE).pages == 1000
        assert lazy.slots == 1000
        assert machine.native.map.count == 1001
        assert guest.read64(START + 999 * HOST_PAGE) == START + 999 * HOST_PAGE


def test_memory_on_demand_leaves_nothing_behind() -> None:
    with lazy_puppet(Protection.EMULATED) as (_, _, [guest]):
        guest.touch(START, 4)
    before = Footprint.now()
    for protection in ALL:
        with lazy_puppet(protection, cpus=2) as (_, lazy, guests):
            for guest in guests:
                guest.touch(START, 16, access=Access.WRITE)
            assert lazy.slots == 16
        assert Footprint.now() == before
