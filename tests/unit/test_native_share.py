# SPDX-License-Identifier: Apache-2.0
"""The share doorbell and the hypercalls of the emulated protection, in a fake kernel."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from pyvmm import abi
from pyvmm.memory import ledger
from pyvmm.memory.address import Gpa
from tests.fake_kvm import MOVING, Rig, hypercall, load, store

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES, MEMINFO, SHARE, UNSHARE = abi.HVC_FEATURES, abi.HVC_MEMINFO, abi.HVC_SHARE, abi.HVC_UNSHARE
BELL = 0x0910_0000
MINUS_1, MINUS_3 = 2**64 - 1, 2**64 - 3


# ---- the share doorbell


@pytest.fixture
def bell_rig(make_rig: Callable[..., Rig]) -> Callable[..., Rig]:
    def make(protection: str, *, subscribers: int = 1) -> Rig:
        rig = make_rig(protection=protection)
        rig.lib.pv_subscribe(rig.vm, subscribers)
        for page in range(rig.pages):
            rig.state(page, "HOST" if protection == "NONE" else "PRIVATE", assumed=protection == "PKVM")
        rig.bus((BELL, 0x1000, "SHARE", None))
        return rig

    return make


@pytest.mark.parametrize("protection", ["NONE", "PKVM"])
def test_subscribers_hear_of_a_rung_share_and_unshare_before_the_guest_continues(
    bell_rig: Callable[..., Rig], protection: str
) -> None:
    rig = bell_rig(protection)
    page = rig.RAM + 4096
    exits = rig.script(store(BELL, page | 1), load(BELL), store(BELL, page | 2), load(BELL, 4))
    vcpu = rig.vcpus[0]
    assert rig.run() == "SHARE"
    assert vcpu.fake.entered == 1
    assert (vcpu.native.share_gpa, vcpu.native.share_op) == (page, 1)
    assert vcpu.native.share_source == rig.lib.PV_SOURCE_DOORBELL
    assert rig.ledger[1] == rig.lib.PV_PAGE_SHARED
    assert rig.run() == "SHARE"
    assert (vcpu.native.share_gpa, vcpu.native.share_op) == (page, 0)
    assert rig.ledger[1] == (rig.lib.PV_PAGE_HOST if protection == "NONE" else rig.lib.PV_PAGE_PRIVATE | 0x80)
    assert rig.run() == "OTHER"
    assert (exits[1].answer, exits[3].answer) == (0, 0)
    assert (rig.vm.shares, rig.vm.unshares, rig.vm.refused) == (1, 1, 0)
    assert [(r.kind, r.code, r.addr, r.value) for r in rig.records()] == [
        (rig.lib.PV_REC_SHARE, rig.lib.PV_SOURCE_DOORBELL, page, 0),
        (rig.lib.PV_REC_UNSHARE, rig.lib.PV_SOURCE_DOORBELL, page, 0),
    ]


def test_a_page_rung_twice_is_reported_once(bell_rig: Callable[..., Rig]) -> None:
    rig = bell_rig("PKVM")
    exits = rig.script(store(BELL, rig.RAM | 1), store(BELL, rig.RAM | 1), load(BELL))
    assert rig.run() == "SHARE"
    assert rig.run() == "OTHER"
    assert exits[2].answer == 0
    assert rig.vm.shares == 1


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (Rig.RAM, 8),
        (Rig.RAM | 3, 8),
        (Rig.RAM | 4, 8),
        (Rig.RAM | 0x801, 8),
        (1, 8),
        (Rig.RAM - 4096 | 1, 8),
        (Rig.RAM + 4 * 4096 | 1, 8),
        (2**64 - 4096 | 1, 8),
        (2**63 | 2, 8),
        (Rig.RAM | 1, 4),
    ],
)
@pytest.mark.parametrize("protection", ["NONE", "PKVM", "EMULATED"])
def test_an_invalid_ring_is_refused_and_changes_nothing(
    bell_rig: Callable[..., Rig], protection: str, value: int, size: int
) -> None:
    rig = bell_rig(protection)
    before = bytes(rig.ledger)
    exits = rig.script(store(BELL, value, size), load(BELL), load(BELL, 4))
    assert rig.run() == "OTHER"
    assert (exits[1].answer, exits[2].answer) == (MINUS_3, 2**32 - 3)
    assert bytes(rig.ledger) == before
    assert (rig.vm.shares, rig.vm.refused) == (0, 1)


def test_a_claimed_share_is_refused_under_pkvm_if_the_page_cannot_be_read(bell_rig: Callable[..., Rig]) -> None:
    rig = bell_rig("PKVM")
    rig.close_view(2)
    exits = rig.script(store(BELL, rig.RAM + 2 * 4096 | 1), load(BELL))
    assert rig.run() == "OTHER"
    assert exits[1].answer == MINUS_1
    assert rig.ledger[2] == rig.lib.PV_PAGE_PRIVATE | 0x80


@pytest.mark.parametrize("protection", ["NONE", "PKVM", "EMULATED"])
@pytest.mark.parametrize("op", [1, 2])
def test_a_ring_for_a_page_of_a_slot_being_removed_is_refused_and_not_counted(
    bell_rig: Callable[..., Rig], protection: str, op: int
) -> None:
    rig = bell_rig(protection)
    rig.state(1, "ABSENT")
    pages = list(rig.vm.pages)
    exits = rig.script(store(BELL, rig.RAM + 4096 | op), load(BELL))
    assert rig.run() == "OTHER"
    assert exits[1].answer == MINUS_3
    assert (rig.ledger[1], list(rig.vm.pages)) == (rig.lib.PV_PAGE_ABSENT, pages)


def test_a_ring_under_the_emulated_protection_must_agree_with_the_hypercall(bell_rig: Callable[..., Rig]) -> None:
    rig = bell_rig("EMULATED")
    rig.state(0, "PRIVATE")
    rig.state(1, "SHARED")
    exits = rig.script(
        *[a for page in (0, 1) for op in (1, 2) for a in (store(BELL, rig.RAM + page * 4096 | op), load(BELL))]
    )
    assert rig.run() == "OTHER"
    assert [exits[n].answer for n in (1, 3, 5, 7)] == [MINUS_1, MINUS_1, 0, 0]
    assert list(rig.ledger)[:2] == [rig.lib.PV_PAGE_PRIVATE, rig.lib.PV_PAGE_SHARED]


# ---- hypercalls


@pytest.fixture
def emulated(make_rig: Callable[..., Rig]) -> Rig:
    rig = make_rig(protection="EMULATED")
    for page in range(4):
        rig.state(page, "PRIVATE")
    rig.memory[:] = b"\x5a" * len(rig.memory)
    rig.close_view(0, 4)
    rig.vm.subscribers = 1
    return rig


def test_features_and_meminfo_are_answered_as_by_el2(emulated: Rig) -> None:
    exits = emulated.script(
        hypercall(FEATURES, 9, 9, 9), hypercall(MEMINFO), hypercall(MEMINFO, 1), hypercall(MEMINFO, 0, 0, 1)
    )
    assert emulated.run() == "OTHER"
    assert list(exits[0].out) == [0x1D, 0, 0, 0]
    assert [e.out[0] for e in exits][1:] == [4096, MINUS_3, MINUS_3]


def test_a_shared_page_is_opened_before_subscribers_hear_of_it(emulated: Rig) -> None:
    exits = emulated.script(hypercall(SHARE, emulated.RAM + 4096))
    assert emulated.run() == "SHARE"
    native = emulated.vcpus[0].native
    assert (native.share_gpa, native.share_op, native.share_source) == (
        emulated.RAM + 4096,
        1,
        emulated.lib.PV_SOURCE_HYPERCALL,
    )
    assert emulated.memory[4096] == 0x5A
    assert [emulated.lib.pv_probe(emulated.vm, emulated.RAM + n * 4096) for n in range(4)] == [0, 1, 0, 0]
    assert emulated.run() == "OTHER"
    assert (exits[0].out[0], emulated.vm.shares) == (0, 1)
    assert emulated.vcpus[0].fake.one_regs == 4


def test_an_unshared_page_is_closed_after_subscribers_released_it(emulated: Rig) -> None:
    emulated.state(1, "SHARED")
    emulated.open_view(1)
    exits = emulated.script(hypercall(UNSHARE, emulated.RAM + 4096))
    assert emulated.run() == "SHARE"
    assert emulated.vcpus[0].native.share_op == 0
    assert emulated.lib.pv_probe(emulated.vm, emulated.RAM + 4096) == 1
    assert emulated.ledger[1] == emulated.lib.PV_PAGE_PRIVATE | MOVING
    assert emulated.run() == "OTHER"
    assert exits[0].out[0] == 0
    assert emulated.lib.pv_probe(emulated.vm, emulated.RAM + 4096) == 0
    assert emulated.ledger[1] == emulated.lib.PV_PAGE_PRIVATE
    assert emulated.vm.unshares == 1


@pytest.mark.parametrize(
    ("nr", "x", "state"),
    [
        (SHARE, (Rig.RAM + 1,), "PRIVATE"),
        (SHARE, (Rig.RAM - 4096,), "PRIVATE"),
        (SHARE, (2**64 - 4096,), "PRIVATE"),
        (SHARE, (Rig.RAM, 1), "PRIVATE"),
        (SHARE, (Rig.RAM, 0, 1), "PRIVATE"),
        (SHARE, (Rig.RAM,), "SHARED"),
        (SHARE, (Rig.RAM,), "POISONED"),
        (SHARE, (Rig.RAM,), "ABSENT"),
        (UNSHARE, (Rig.RAM,), "ABSENT"),
        (UNSHARE, (Rig.RAM,), "PRIVATE"),
        (UNSHARE, (Rig.RAM, 0, 2**63), "SHARED"),
    ],
)
def test_calls_that_el2_refuses_are_refused_and_change_nothing(
    emulated: Rig, nr: int, x: tuple[int, ...], state: str
) -> None:
    emulated.state(0, state)
    before = emulated.lib.fake_protects()
    exits = emulated.script(hypercall(nr, *x))
    assert emulated.run() == "OTHER"
    assert exits[0].out[0] == MINUS_3
    assert emulated.lib.fake_protects() == before
    assert emulated.ledger[0] == getattr(emulated.lib, f"PV_PAGE_{state}")
    assert emulated.vm.refused == 1


@pytest.mark.parametrize(("conversion", "contents"), [("PRESERVE", 0x5A), ("ZERO", 0), ("PUNCH", 0)])
@pytest.mark.parametrize("nr", [SHARE, UNSHARE])
def test_each_conversion_changes_the_contents_as_its_name_says(
    emulated: Rig, conversion: str, contents: int, nr: int
) -> None:
    emulated.vm.conversion = getattr(emulated.lib, f"PV_CONVERT_{conversion}")
    emulated.vm.subscribers = 0
    if nr == UNSHARE:
        emulated.state(3, "SHARED")
        emulated.open_view(3)
    exits = emulated.script(hypercall(nr, emulated.RAM + 3 * 4096))
    assert emulated.run() == "OTHER"
    assert exits[0].out[0] == 0
    assert emulated.lib.pv_probe(emulated.vm, emulated.RAM + 3 * 4096) == (nr == SHARE)
    emulated.open_view(0, 4)
    assert set(emulated.memory[3 * 4096 :]) == {contents}
    assert set(emulated.memory[: 3 * 4096]) == {0x5A}


@pytest.mark.parametrize("nr", [SHARE, UNSHARE])
def test_an_exhausted_map_count_fails_the_call_and_leaves_the_page_unchanged(emulated: Rig, nr: int) -> None:
    emulated.vm.conversion = emulated.lib.PV_CONVERT_PUNCH
    emulated.vm.subscribers = 0
    if nr == UNSHARE:
        emulated.state(0, "SHARED")
        emulated.open_view(0)
    emulated.lib.fake_protect_fails(1)
    exits = emulated.script(hypercall(nr, emulated.RAM), hypercall(nr, emulated.RAM))
    emulated.vcpus[0].fake.count = 1
    assert emulated.run() == "OTHER"
    assert exits[0].out[0] == MINUS_1
    assert emulated.lib.pv_probe(emulated.vm, emulated.RAM) == (nr == UNSHARE)
    assert emulated.ledger[0] == (emulated.lib.PV_PAGE_SHARED if nr == UNSHARE else emulated.lib.PV_PAGE_PRIVATE)
    emulated.open_view(0, 4)
    assert emulated.memory[0] == 0x5A


def test_a_failed_punch_restores_the_view(emulated: Rig) -> None:
    emulated.vm.conversion = emulated.lib.PV_CONVERT_PUNCH
    emulated.vm.map.regions[0].fd = 1 << 20  # an invalid descriptor
    exits = emulated.script(hypercall(SHARE, emulated.RAM))
    assert emulated.run() == "OTHER"
    assert exits[0].out[0] == MINUS_1
    assert emulated.lib.pv_probe(emulated.vm, emulated.RAM) == 0


@pytest.mark.parametrize("status", [0, -1])
def test_python_does_a_cold_conversion_and_the_guest_gets_its_result(emulated: Rig, status: int) -> None:
    emulated.vm.conversion = emulated.lib.PV_CONVERT_COLD
    exits = emulated.script(hypercall(SHARE, emulated.RAM))
    native = emulated.vcpus[0].native
    assert emulated.run() == "CONVERT"
    assert (native.share_gpa, native.share_op) == (emulated.RAM, 1)
    native.share_status = status
    assert emulated.run() == ("OTHER" if status else "SHARE")
    if not status:
        assert emulated.run() == "OTHER"
    assert exits[0].out[0] == status % 2**64
    assert emulated.ledger[0] == (emulated.lib.PV_PAGE_PRIVATE if status else emulated.lib.PV_PAGE_SHARED)


@pytest.mark.parametrize("status", [0, -1])
def test_a_cold_unshare_notifies_subscribers_and_then_converts(emulated: Rig, status: int) -> None:
    emulated.vm.conversion = emulated.lib.PV_CONVERT_COLD
    emulated.state(0, "SHARED")
    exits = emulated.script(hypercall(UNSHARE, emulated.RAM))
    moving = emulated.lib.PV_PAGE_PRIVATE | MOVING
    assert (emulated.run(), emulated.ledger[0]) == ("SHARE", moving)
    assert (emulated.run(), emulated.ledger[0]) == ("CONVERT", moving)
    emulated.vcpus[0].native.share_status = status
    assert emulated.run() == "OTHER"
    assert exits[0].out[0] == status % 2**64
    assert emulated.ledger[0] == (emulated.lib.PV_PAGE_SHARED if status else emulated.lib.PV_PAGE_PRIVATE)


def test_two_vcpus_that_unshare_one_page_unshare_it_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(protection="EMULATED", vcpus=2)
    rig.state(0, "SHARED")
    rig.vm.subscribers = 1
    exits = [rig.script(hypercall(UNSHARE, rig.RAM), vcpu=n) for n in range(2)]
    assert [rig.run(0), rig.run(1), rig.run(0)] == ["SHARE", "OTHER", "OTHER"]
    assert [e[0].out[0] for e in exits] == [0, MINUS_3]
    assert (rig.vm.unshares, rig.vm.refused) == (1, 1)


@pytest.fixture
def taking_back(make_rig: Callable[..., Rig]) -> Rig:
    """Make two vCPUs. The first is stopped so that subscribers hear that it unshares page 1."""
    rig = make_rig(protection="EMULATED", vcpus=2)
    for page in range(4):
        rig.state(page, "SHARED")
    rig.lib.pv_subscribe(rig.vm, 1)
    rig.bus((BELL, 0x1000, "SHARE", None))
    rig.script(hypercall(UNSHARE, rig.RAM + 4096))
    assert rig.run() == "SHARE"
    return rig


def test_a_page_being_unshared_is_not_shared_and_cannot_be_shared_again(taking_back: Rig) -> None:
    rig, page = taking_back, taking_back.RAM + 4096
    assert rig.ledger[1] & ~MOVING == rig.lib.PV_PAGE_PRIVATE
    before = rig.lib.fake_protects()
    exits = rig.script(hypercall(SHARE, page), store(BELL, page | 1), load(BELL), vcpu=1)
    assert rig.run(1) == "OTHER"
    assert (exits[0].out[0], exits[2].answer) == (MINUS_3, MINUS_3)
    assert rig.lib.fake_protects() == before
    assert rig.lib.pv_probe(rig.vm, page) == 1
    assert rig.run(0) == "OTHER"
    assert rig.vcpus[0].fake.x[0] == 0
    assert rig.ledger[1] == rig.lib.PV_PAGE_PRIVATE
    assert rig.lib.pv_probe(rig.vm, page) == 0
    assert (rig.vm.unshares, rig.vm.shares, rig.vm.refused) == (1, 0, 2)
    assert (rig.vm.pages[rig.lib.PV_PAGE_PRIVATE], rig.vm.pages[rig.lib.PV_PAGE_SHARED]) == (1, 3)


def test_an_unshared_page_can_be_shared_again_afterwards(taking_back: Rig) -> None:
    rig, page = taking_back, taking_back.RAM + 4096
    assert rig.run(0) == "OTHER"
    rig.script(hypercall(SHARE, page), vcpu=1)
    assert rig.run(1) == "SHARE"
    assert (rig.ledger[1], rig.lib.pv_probe(rig.vm, page)) == (rig.lib.PV_PAGE_SHARED, 1)


def test_a_page_that_cannot_be_closed_becomes_shared_again(taking_back: Rig) -> None:
    rig = taking_back
    rig.lib.fake_protect_fails(1)
    assert rig.run(0) == "OTHER"
    assert rig.vcpus[0].fake.x[0] == MINUS_1
    assert (rig.ledger[1], rig.lib.pv_probe(rig.vm, rig.RAM + 4096)) == (rig.lib.PV_PAGE_SHARED, 1)
    assert (rig.vm.pages[rig.lib.PV_PAGE_PRIVATE], rig.vm.pages[rig.lib.PV_PAGE_SHARED]) == (0, 4)


def test_a_page_being_unshared_keeps_its_entry_unless_its_slot_is_removed(taking_back: Rig) -> None:
    rig, page = taking_back, taking_back.RAM + 4096
    for state in ("HOLE", "SHARED"):
        assert rig.lib.pv_ledger_set(rig.vm, page, getattr(rig.lib, f"PV_PAGE_{state}")) == rig.lib.PV_PAGE_PRIVATE
        assert rig.ledger[1] == rig.lib.PV_PAGE_PRIVATE | MOVING
    rig.state(1, "ABSENT")
    assert rig.run(0) == "OTHER"
    assert rig.vcpus[0].fake.x[0] == MINUS_3
    assert rig.ledger[1] == rig.lib.PV_PAGE_ABSENT
    assert list(rig.vm.pages)[:4] == [1, 0, 0, 3]


def test_readers_of_the_ledger_do_not_see_that_a_page_is_being_unshared(taking_back: Rig) -> None:
    rig = taking_back
    whole = ledger.Ledger(rig.vm)
    area = ledger.Area.new(Gpa(rig.RAM), 4 * 4096)
    area.entries[0:4] = bytes(rig.ledger)
    whole.enter(area)
    assert area.entries[1] == ledger.PageState.PRIVATE | MOVING
    assert (whole.state(rig.RAM + 4096), whole.entry(rig.RAM + 4096)) == (ledger.PageState.PRIVATE,) * 2
    assert "private" in whole.describe(rig.RAM + 4096)
    assert whole.entries(rig.RAM, 4 * 4096) == whole.snapshot()[0][1] == bytes([3, 2, 3, 3])
    assert whole.counts()[ledger.PageState.PRIVATE] == 1


# ---- exits of Android's kernels


@pytest.fixture
def android(make_rig: Callable[..., Rig]) -> Rig:
    rig = make_rig(protection="PKVM")
    for page in range(4):
        rig.state(page, "PRIVATE", assumed=True)
    rig.lib.pv_subscribe(rig.vm, 1)
    return rig


def test_a_share_reported_by_the_kernel_is_entered_and_passed_to_subscribers(android: Rig) -> None:
    page, native = android.RAM + 4096, android.vcpus[0].native
    exits = android.script(*[hypercall(nr, 7, 8, 9, told=page) for nr in (SHARE, SHARE, UNSHARE)])
    assert android.run() == "SHARE"
    assert (native.share_gpa, native.share_op, native.share_source) == (page, 1, android.lib.PV_SOURCE_EXIT)
    assert android.ledger[1] == android.lib.PV_PAGE_SHARED
    assert android.run() == "SHARE"
    assert (native.share_gpa, native.share_op, native.share_source) == (page, 0, android.lib.PV_SOURCE_EXIT)
    assert android.ledger[1] == android.lib.PV_PAGE_PRIVATE | 0x80
    assert android.run() == "OTHER"
    assert [list(e.out)[1:] for e in exits] == [[7, 8, 9]] * 3
    assert android.vcpus[0].fake.one_regs == 0
    assert (android.vm.shares, android.vm.unshares, android.vm.refused) == (1, 1, 0)
    assert [(r.kind, r.code, r.addr, r.value) for r in android.records()] == [
        (android.lib.PV_REC_SHARE, android.lib.PV_SOURCE_EXIT, page, 0),
        (android.lib.PV_REC_UNSHARE, android.lib.PV_SOURCE_EXIT, page, 0),
    ]


def test_a_share_reported_by_the_kernel_does_not_stop_the_loop_without_subscribers(android: Rig) -> None:
    android.lib.pv_subscribe(android.vm, 0)
    android.script(hypercall(SHARE, told=android.RAM))
    assert android.run() == "OTHER"
    assert (android.ledger[0], android.vm.shares) == (android.lib.PV_PAGE_SHARED, 1)


@pytest.mark.parametrize("gpa", [Rig.RAM + 8, Rig.RAM - 4096, Rig.RAM + 4 * 4096, 2**64 - 4096, Rig.RAM + 3 * 4096])
@pytest.mark.parametrize("nr", [SHARE, UNSHARE])
def test_a_share_of_a_page_outside_memory_is_counted_and_the_guest_continues(android: Rig, gpa: int, nr: int) -> None:
    android.state(3, "ABSENT")
    before = bytes(android.ledger)
    android.script(hypercall(nr, Rig.RAM, told=gpa))
    assert android.run() == "OTHER"
    assert bytes(android.ledger) == before
    assert (android.vm.shares, android.vm.unshares, android.vm.refused) == (0, 0, 1)
    assert android.vcpus[0].fake.one_regs == 0


def test_python_handles_hypercalls_of_other_protections_and_unknown_ones(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(protection="NONE")
    rig.script(hypercall(SHARE, rig.RAM, told=rig.RAM))
    assert rig.run() == "HYPERCALL"
    android = make_rig(protection="PKVM")
    android.script(hypercall(MEMINFO))
    assert android.run() == "HYPERCALL"
    other = make_rig(protection="EMULATED")
    other.script(hypercall(0x8400_0000))
    assert other.run() == "HYPERCALL"
    assert other.vcpus[0].native.value == 0x8400_0000


def test_a_register_that_cannot_be_read_stops_the_vcpu(emulated: Rig) -> None:
    emulated.vcpus[0].fake.one_reg_error = errno.EIO
    emulated.script(hypercall(SHARE, emulated.RAM))
    assert emulated.run() == "FAILED"
    assert emulated.vcpus[0].native.error == errno.EIO
