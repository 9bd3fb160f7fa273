# SPDX-License-Identifier: Apache-2.0
"""Every order of the puppet, in every protection."""

from __future__ import annotations

import struct

import pytest

from pyvmm import abi
from pyvmm.errors import GuestMemoryError
from pyvmm.guest.orders import Access, GuestFault, GuestRefused, What
from pyvmm.machine import layout
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Ending
from tests.pkvm.harness import ALL, DEADLINE, puppet

pytestmark = pytest.mark.pkvm
each_protection = pytest.mark.parametrize("protection", ALL, ids=lambda p: p.value)

PAGE = 0x8080_0000
SPARE = 0x8090_0000
NOWHERE = 0xDEAD_0000_0000
BEYOND = 0x8100_0000
RET = 0xD65F_03C0
ADD_X0_X0_1 = 0x9100_0400


@each_protection
def test_the_puppet_runs_at_el1_with_its_caches_on(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        pong = guest.ping()
    assert pong.el == 1
    assert pong.sctlr & 0x1005 == 0x1005
    assert pong.mpidr & 0xFF == 0
    assert pong.hz > 0


@each_protection
def test_one_order_loads_what_another_stored(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        for bits in (8, 16, 32, 64):
            getattr(guest, f"write{bits}")(PAGE + bits, (1 << bits) - 2)
            assert getattr(guest, f"read{bits}")(PAGE + bits) == (1 << bits) - 2
        guest.fill(PAGE, 4096, 0x0101)
        assert guest.sum(PAGE, 4096) == 512 * 0x0101
        assert guest.words(PAGE, 20) == (0x0101,) * 20
        assert guest.hammer(PAGE, 64, 3, Access.WRITE) == 3
        assert guest.read64(PAGE + 56) == 2


@each_protection
def test_an_order_that_traps_is_answered_and_the_next_one_works(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        for gpa, status in ((NOWHERE, 0b000100), (BEYOND, 0b010000)):
            with pytest.raises(GuestFault) as caught:
                guest.read64(gpa)
            trap = caught.value.trap
            assert trap is not None
            assert (trap.far, trap.esr & 0x3F, trap.is_write) == (gpa, status, False)
        with pytest.raises(GuestFault, match="instruction abort: fetch from 0xdead_0000_0000"):
            guest.execute(NOWHERE)
        with pytest.raises(GuestFault, match="store to 0xdead_0000_0000"):
            guest.write8(NOWHERE, 1)
        assert guest.ping().el == 1


@each_protection
def test_a_shared_page_holds_what_either_side_wrote(protection: Protection) -> None:
    with puppet(protection) as (machine, guest):
        guest.write64(PAGE, 0x1122_3344)
        if protection.isolates:
            with pytest.raises(GuestMemoryError):
                machine.memory.read(PAGE, 8)
        guest.share(PAGE)
        assert machine.memory.read(PAGE, 8) == (0x1122_3344).to_bytes(8, "little")
        machine.memory.write(PAGE, (0x5566).to_bytes(8, "little"))
        assert guest.read64(PAGE) == 0x5566
        guest.unshare(PAGE)
        assert guest.read64(PAGE) == 0x5566
        if protection.isolates:
            with pytest.raises(GuestMemoryError):
                machine.memory.read(PAGE, 8)


@pytest.mark.parametrize("protection", [Protection.EMULATED, Protection.PKVM], ids=lambda p: p.value)
def test_sharing_twice_is_refused_and_names_the_page(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        assert guest.share(PAGE, 3).pages == 3
        with pytest.raises(GuestRefused, match="share of gpa 0x8080_0000 was refused: -3"):
            guest.share(PAGE)
        done = guest.share(PAGE - 4096, 2, check=False)
        assert (done.status, done.pages) == (-3, 1)


@each_protection
def test_the_hypervisor_answers_the_calls_it_offers(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        features = guest.hvc(abi.HVC_FEATURES).regs[0]
        offered = bool(features >> abi.HVC_FEATURE_SHARE_BIT & 1)
        assert offered is protection.isolates
        if offered:
            assert guest.hvc(abi.HVC_MEMINFO).status == 4096
        assert guest.hvc(0x8600_00FE).status == -1


@each_protection
def test_a_first_touch_takes_longer_than_a_second(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        cold = guest.touch(PAGE, 32, seed=5, ticks_at=SPARE)
        mapped = guest.touch(PAGE, 32, seed=5, ticks_at=SPARE)
    assert cold.pages == mapped.pages == 32
    assert sum(cold.per_page) == cold.ticks
    assert max(cold.per_page) == cold.max
    assert sorted(cold.order) == list(range(32))
    assert cold.order == mapped.order != tuple(range(32))
    assert sorted(cold.per_page)[16] > 5 * sorted(mapped.per_page)[16]


@each_protection
def test_each_access_of_a_series_is_timed(protection: Protection) -> None:
    with puppet(protection) as (machine, guest):
        guest.share(SPARE)
        done = guest.series(What.STORE, layout.BENCH.start, 20, value=7, ticks_at=SPARE)
        each = struct.unpack("<20I", machine.memory.read(SPARE, 80))
        assert done == (0, 20, sum(each))
        assert min(each) > 0
        assert machine.exit_targets.registers[:8] == (7).to_bytes(8, "little")
        done = guest.series(What.SHARE, PAGE, 8, stride=4096)
        assert done[:2] == (0, 8)
        again = guest.series(What.SHARE, PAGE, 8, stride=4096)
        assert again[:2] == ((-3, 0) if protection.isolates else (0, 8))


@each_protection
def test_every_way_of_touching_reaches_every_page(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        for number, access in enumerate(Access):
            for seed in (0, 7):
                area = PAGE + number * 0x10_0000 + seed * 0x1_0000
                touched = guest.touch(area, 13, stride=2, access=access, seed=seed, ticks_at=SPARE + 0x30_0000)
                assert touched.pages == 13
                assert len([ticks for ticks in touched.per_page if ticks > 0]) == 13


@each_protection
def test_the_puppet_runs_code_that_orders_wrote(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        guest.write32(PAGE, ADD_X0_X0_1)
        guest.write32(PAGE + 4, RET)
        guest.flush(PAGE, 8)
        assert guest.execute(PAGE, 41).value == 42


@each_protection
def test_two_vcpus_take_orders_at_the_same_time(protection: Protection) -> None:
    with puppet(protection, cpus=3) as (_, first):
        others = [first.cpu_on(n) for n in (1, 2)]
        assert [guest.ping().mpidr & 0xFF for guest in (first, *others)] == [0, 1, 2]
        busy = [guest.start_hammer(PAGE, 4096, 200, Access.WRITE) for guest in others]
        first.write64(SPARE, 1)
        assert [order.result() for order in busy] == [200, 200]
        with pytest.raises(GuestRefused, match=r"-4 \(ALREADY_ON\)"):
            first.cpu_on(1)
        with pytest.raises(GuestFault, match="vCPU 2"):
            others[1].read64(NOWHERE)


@each_protection
def test_a_vcpu_that_powered_off_can_start_again(protection: Protection) -> None:
    with puppet(protection, cpus=2) as (_, first):
        second = first.cpu_on(1)
        second.write64(PAGE, 3)
        second.cpu_off()
        for _ in range(1000):
            state = first.hvc(0xC400_0004, layout.mpidr(1), 0).status
            if state == 1:
                break
        else:
            pytest.fail("the vCPU never went off")
        assert first.cpu_on(1).read64(PAGE) == 3


@each_protection
def test_the_puppet_times_device_accesses_in_a_loop(protection: Protection) -> None:
    with puppet(protection) as (_, guest):
        one = guest.mmio(layout.BENCH.start + abi.BENCH_COUNTER, 1, value=1)
        many = guest.mmio(layout.BENCH.start + abi.BENCH_COUNTER, 20, value=1)
        assert guest.read64(layout.BENCH.start + abi.BENCH_COUNTER) == 21
    assert many > one > 0


def test_the_handle_distinguishes_an_unknown_order_from_a_trap() -> None:
    with puppet(Protection.NONE) as (_, guest):
        with pytest.raises(Exception, match="does not know this order"):
            guest.start(999).result()
        assert guest.ping().el == 1


@each_protection
@pytest.mark.parametrize(("order", "ending"), [("off", Ending.POWEROFF), ("reset", Ending.RESET)])
def test_the_puppet_ends_the_machine_when_told(order: str, ending: Ending, protection: Protection) -> None:
    with puppet(protection) as (machine, guest):
        guest.ping()
        getattr(guest, order)()
        assert machine.wait(DEADLINE).ending is ending
