"""The loop's kinds, shares and failures one by one, in a fake kernel."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.fake_kvm import EXIT_DEBUG, EXIT_SYSTEM, Rig, failure, hypercall, load, store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FEATURES, MEMINFO, SHARE, UNSHARE = 0x8600_0000, 0xC600_0002, 0xC600_0003, 0xC600_0004
DEVICE = 0x0930_0000
BELL = 0x0910_0000
MINUS_1, MINUS_3 = 2**64 - 1, 2**64 - 3


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**arguments: Any) -> Rig:
        rigs.append(Rig(**arguments))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK)


def rung(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def printed(rig: Rig, uart: Any, most: int = 16) -> bytes:
    out = rig.new("uint8_t[]", 16)
    n = rig.lib.pv_fifo_read(rig.ffi.addressof(uart, "tx"), out, most)
    return bytes(out)[:n]


# ---- MMIO


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1, 8, 15])
def test_registers_keep_what_was_stored(rig: Rig, size: int, offset: int) -> None:
    state = rig.new("uint8_t[]", 32)
    rig.bus((DEVICE, 32, "REGISTERS", state))
    exits = rig.script(store(DEVICE + offset, 0x8877_6655_4433_2211, size), load(DEVICE + offset, size))
    assert rig.run() == "OTHER"
    assert exits[1].answer == 0x8877_6655_4433_2211 & (1 << 8 * size) - 1
    assert bytes(state) == bytes(offset) + 0x8877_6655_4433_2211.to_bytes(8, "little")[:size] + bytes(
        32 - offset - size
    )


def test_access_across_the_end_of_a_range_belongs_to_nobody(rig: Rig) -> None:
    state = rig.new("uint8_t[]", 16)
    rig.bus((DEVICE, 12, "REGISTERS", state))
    rig.script(store(DEVICE + 8, MINUS_1, 8))
    assert rig.run() == "UNCLAIMED"
    vcpu = rig.vcpus[0].native
    assert vcpu.range == rig.ffi.NULL
    assert (vcpu.gpa, vcpu.size, vcpu.is_write, vcpu.value) == (DEVICE + 8, 8, 1, MINUS_1)
    assert bytes(state) == bytes(16)


def test_each_range_is_found_among_many_and_counts_its_own_accesses(rig: Rig) -> None:
    counters = [rig.new("uint64_t *") for _ in range(9)]
    rig.bus(*[(DEVICE + n * 0x2000, 0x1000, "COUNTER", counter) for n, counter in enumerate(counters)])
    rig.script(*[store(DEVICE + n * 0x2000 + 8 * n, n + 1) for n in [*range(9), *reversed(range(9))]], load(DEVICE))
    assert rig.run() == "OTHER"
    assert [counter[0] for counter in counters] == [2 * (n + 1) for n in range(9)]
    assert [(r.reads, r.writes) for r in rig.ranges] == [(1, 2)] + [(0, 2)] * 8
    assert rig.vcpus[0].native.stats[rig.lib.PV_EXIT_MMIO_COUNTER].count == 19


def test_gap_between_ranges_and_an_empty_bus_are_unclaimed(rig: Rig) -> None:
    rig.script(load(DEVICE), load(DEVICE + 0x1800), load(DEVICE + 0x3000))
    assert rig.run() == "UNCLAIMED"
    rig.bus((DEVICE, 0x1000, "COUNTER", rig.new("uint64_t *")), (DEVICE + 0x2000, 0x1000, "COLD", None))
    assert rig.run() == "UNCLAIMED"
    assert rig.vcpus[0].native.gpa == DEVICE + 0x1800
    assert rig.run() == "UNCLAIMED"
    assert rig.vcpus[0].native.gpa == DEVICE + 0x3000


def test_replaced_bus_is_used_from_the_next_exit_on(rig: Rig) -> None:
    first, second = rig.new("uint64_t *"), rig.new("uint64_t *")
    rig.bus((DEVICE - 0x1000, 0x1000, "COLD", None), (DEVICE, 8, "COUNTER", first))
    rig.script(store(DEVICE, 1), load(DEVICE - 8), store(DEVICE, 1))
    assert rig.run() == "MMIO"
    rig.bus((DEVICE, 8, "COUNTER", second))
    assert rig.run() == "OTHER"
    assert (first[0], second[0]) == (1, 1)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_python_answers_a_cold_load(rig: Rig, size: int) -> None:
    rig.bus((DEVICE, 0x1000, "COLD", None))
    exits = rig.script(load(DEVICE + 16, size), store(DEVICE + 24, 0x1234, size))
    assert rig.run() == "MMIO"
    vcpu = rig.vcpus[0].native
    assert (vcpu.offset, vcpu.size, vcpu.is_write, vcpu.range.index) == (16, size, 0, 0)
    rig.lib.pv_mmio_reply(vcpu, 0x1122_3344_5566_7788)
    assert rig.run() == "MMIO"
    assert exits[0].answer == 0x1122_3344_5566_7788 & (1 << 8 * size) - 1
    assert (vcpu.offset, vcpu.is_write, vcpu.value) == (24, 1, 0x1234 & (1 << 8 * size) - 1)


def test_doorbell_rings_only_the_slot_that_matches(rig: Rig) -> None:
    fds = [eventfd() for _ in range(3)]
    slots = rig.new(
        "struct pv_doorbell_slot[]",
        [(0x50, 1, fds[0], 0), (0x50, 2, fds[1], 0), (0x58, 0, fds[2], 1)],
    )
    bell = rig.new("struct pv_doorbell *", {"count": 3, "slots": slots})
    rig.bus((DEVICE, 0x1000, "DOORBELL", bell))
    exits = rig.script(
        store(DEVICE + 0x50, 2, 4), store(DEVICE + 0x50, 2, 4), store(DEVICE + 0x50, 3, 4), store(DEVICE + 0x58, 77, 2),
        store(DEVICE + 0x60, 1, 4), load(DEVICE + 0x50, 4),
    )  # fmt: skip
    exits[5].data = MINUS_1
    assert rig.run() == "OTHER"
    assert [rung(fd) for fd in fds] == [0, 2, 1]
    assert bell.missed == 2
    assert exits[5].answer == 0


def test_coalescing_doorbell_is_written_once_until_it_is_taken(rig: Rig) -> None:
    fd = eventfd()
    slots = rig.new("struct pv_doorbell_slot[]", [(0, 5, fd, 0, 1)])
    rig.bus((DEVICE, 0x1000, "DOORBELL", rig.new("struct pv_doorbell *", {"count": 1, "slots": slots})))
    rings = [store(DEVICE, 5)] * 3
    rig.script(*rings)
    rig.run()
    assert rung(fd) == 1
    rig.script(*rings)
    rig.run()
    assert rung(fd) == 0
    rig.lib.pv_doorbell_take(slots)
    rig.script(*rings)
    rig.run()
    assert rung(fd) == 1


# ---- PL011


def test_uart_carries_bytes_both_ways_and_says_so_in_its_flags(rig: Rig) -> None:
    uart = rig.pl011()
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    rig.lib.pv_pl011_feed(uart, b"ab", 2)
    exits = rig.script(
        *[store(DEVICE, c, 1) for c in b"hi"], load(DEVICE + 0x18, 4), load(DEVICE, 4), load(DEVICE, 4),
        load(DEVICE + 0x18, 4), load(DEVICE, 4),
    )  # fmt: skip
    assert rig.run() == "OTHER"
    assert printed(rig, uart) == b"hi"
    assert [exits[n].answer for n in range(2, 7)] == [0xC0, ord("a"), ord("b"), 0x90, 0]


def test_full_uart_stops_and_loses_or_repeats_no_byte(rig: Rig) -> None:
    uart = rig.pl011(tx=4)
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    text = bytes(range(64, 87))
    rig.script(*[store(DEVICE, c, 1) for c in text])
    got, stops = b"", 0
    while (stop := rig.run()) == "FIFO":
        stops += 1
        if stops % 3 == 0:
            continue  # come back without having drained: it must stop again
        got += printed(rig, uart, stops % 3 * 2)
    got += printed(rig, uart)
    assert stop == "OTHER"
    assert got == text
    assert rig.ranges[0].writes == len(text)
    assert rig.vcpus[0].native.stats[rig.lib.PV_EXIT_MMIO_PL011].count == len(text)


def test_uart_interrupt_rises_once_and_falls_when_its_cause_is_gone(rig: Rig) -> None:
    uart = rig.pl011()
    uart.irq_fd = eventfd()
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    rig.script(store(DEVICE + 0x38, 0x50, 4))
    rig.run()
    for byte in b"xy":
        rig.lib.pv_pl011_feed(uart, bytes([byte]), 1)
    assert (rung(uart.irq_fd), uart.level) == (1, 1)
    exits = rig.script(
        load(DEVICE + 0x40, 4), store(DEVICE + 0x44, 0x7FF, 4), load(DEVICE + 0x3C, 4), load(DEVICE, 4),
        load(DEVICE, 4), load(DEVICE + 0x40, 4),
    )  # fmt: skip
    rig.run()
    assert [exits[n].answer for n in (0, 2, 5)] == [0x10, 0x10, 0]
    assert uart.level == 0
    rig.lib.pv_pl011_feed(uart, b"z", 1)
    assert rung(uart.irq_fd) == 1


def test_transmit_interrupt_is_set_by_a_byte_and_cleared_by_icr(rig: Rig) -> None:
    uart = rig.pl011()
    uart.irq_fd = eventfd()
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    exits = rig.script(
        store(DEVICE, 65, 1), load(DEVICE + 0x3C, 4), load(DEVICE + 0x40, 4), store(DEVICE + 0x38, 0x20, 4),
        load(DEVICE + 0x40, 4), store(DEVICE + 0x44, 0x20, 4), load(DEVICE + 0x3C, 4),
    )  # fmt: skip
    rig.run()
    assert [exits[n].answer for n in (1, 2, 4, 6)] == [0x20, 0, 0x20, 0]
    assert rung(uart.irq_fd) == 1


def test_uart_is_known_by_its_id_registers(rig: Rig) -> None:
    rig.bus((DEVICE, 0x1000, "PL011", rig.pl011()))
    exits = rig.script(*[load(DEVICE + 0xFE0 + 4 * n, 4) for n in range(8)])
    rig.run()
    ids = [e.answer for e in exits]
    # Linux, include/linux/amba/bus.h: part 0x011, designer 0x41 (Arm), then the PrimeCell cell id
    assert sum(ids[n] << 8 * n for n in range(4)) & 0x000F_FFFF == 0x0004_1011
    assert sum(ids[4 + n] << 8 * n for n in range(4)) == 0xB105_F00D


def test_uart_registers_keep_only_their_bits_and_odd_accesses_do_nothing(rig: Rig) -> None:
    rig.bus((DEVICE, 0x1000, "PL011", rig.pl011()))
    bits = {0x20: 0xFF, 0x24: 0xFFFF, 0x28: 0x3F, 0x2C: 0xFF, 0x30: 0xFFFF, 0x34: 0x3F, 0x38: 0x7FF, 0x48: 7}
    exits = rig.script(
        *[store(DEVICE + offset, 0xFFFF_FFFF, 4) for offset in bits], *[load(DEVICE + offset, 4) for offset in bits],
        store(DEVICE + 0x31, 0, 1), store(DEVICE + 0x30, 0, 8), load(DEVICE + 0x30, 4), load(DEVICE + 0x30, 8),
        load(DEVICE + 0x50, 4),
    )  # fmt: skip
    rig.run()
    assert [exits[len(bits) + n].answer for n in range(len(bits))] == list(bits.values())
    assert [exits[2 * len(bits) + n].answer for n in (2, 3, 4)] == [0xFFFF, 0, 0]


# ---- mailbox


def test_puppet_gets_its_order_and_returns_results(rig: Rig) -> None:
    box = rig.new("struct pv_mailbox[]", 1)
    rig.bus((DEVICE, 0x1000, "MAILBOX", box))
    exits = rig.script(
        load(DEVICE), load(DEVICE + 8), load(DEVICE + 0x38), store(DEVICE + 0x40, 11), store(DEVICE + 0x70, 17),
        store(DEVICE + 0x78, 1), store(DEVICE + 0xC8, 5), store(DEVICE + 0xE0, 8), load(DEVICE),
    )  # fmt: skip
    assert rig.run() == "MAILBOX"
    assert rig.run() == "MAILBOX"  # still no order
    box[0].order = [42, 1, 2, 3, 4, 5, 6, 7]
    box[0].state = rig.lib.PV_MAILBOX_ORDER
    assert rig.run() == "MAILBOX"
    assert [exits[n].answer for n in range(3)] == [42, 1, 7]
    assert (box[0].state, list(box[0].result)) == (rig.lib.PV_MAILBOX_DONE, [1, 11, 0, 0, 0, 0, 0, 17])
    assert list(box[0].note) == [5, 0, 0, 8]
    assert (rig.ranges[0].reads, rig.ranges[0].writes) == (4, 5)


def test_trap_stops_the_loop_with_its_registers(rig: Rig) -> None:
    box = rig.new("struct pv_mailbox[]", 1)
    rig.bus((DEVICE, 0x1000, "MAILBOX", box))
    rig.script(*[store(DEVICE + 0x80 + 8 * n, 100 + n) for n in range(8)], store(DEVICE + 0xC0, 0))
    assert rig.run() == "MAILBOX"
    assert box[0].trapped == 1
    assert list(box[0].trap) == list(range(100, 108))


def test_vcpu_reaches_no_mailbox_but_its_own(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(vcpus=2)
    box = rig.new("struct pv_mailbox[]", 2)
    box[0].state, box[0].order = rig.lib.PV_MAILBOX_ORDER, [7] * 8
    rig.bus((DEVICE, 0x2000, "MAILBOX", box))
    exits = rig.script(load(DEVICE), store(DEVICE + 0xC0, 0), store(DEVICE + 0x1000 + 0x90, 9), vcpu=1)
    assert rig.run(1) == "OTHER"
    assert (exits[0].answer, box[0].state, box[0].trapped) == (0, rig.lib.PV_MAILBOX_ORDER, 0)
    assert box[1].trap[2] == 9


@pytest.mark.parametrize("access", [load(DEVICE, 4), load(DEVICE + 4, 8), store(DEVICE + 0x78, 1), load(DEVICE + 0xE8)])
def test_mailbox_ignores_what_is_not_a_whole_register_or_out_of_turn(rig: Rig, access: dict[str, Any]) -> None:
    box = rig.new("struct pv_mailbox[]", 1)
    box[0].state, box[0].order = rig.lib.PV_MAILBOX_ORDER, [7] * 8
    rig.bus((DEVICE, 0x1000, "MAILBOX", box))
    exits = rig.script(access)
    assert rig.run() == "OTHER"
    assert (box[0].state, exits[0].answer) == (rig.lib.PV_MAILBOX_ORDER, 0)


# ---- the share doorbell


@pytest.fixture
def bell_rig(make_rig: Callable[..., Rig]) -> Callable[..., Rig]:
    def make(protection: str, *, subscribers: int = 1) -> Rig:
        rig = make_rig(protection=protection)
        rig.vm.subscribers = subscribers
        rig.bus((BELL, 0x1000, "SHARE", None))
        return rig

    return make


@pytest.mark.parametrize("protection", ["NONE", "PKVM"])
def test_rung_share_and_unshare_are_told_before_the_guest_goes_on(
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


def test_page_rung_twice_is_told_once(bell_rig: Callable[..., Rig]) -> None:
    rig = bell_rig("PKVM")
    exits = rig.script(store(BELL, rig.RAM | 1), store(BELL, rig.RAM | 1), load(BELL))
    assert rig.run() == "SHARE"
    assert rig.run() == "OTHER"
    assert exits[2].answer == 0
    assert rig.vm.shares == 1


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (Rig.RAM, 8), (Rig.RAM | 3, 8), (Rig.RAM | 4, 8), (Rig.RAM | 0x801, 8), (1, 8), (Rig.RAM - 4096 | 1, 8),
        (Rig.RAM + 4 * 4096 | 1, 8), (2**64 - 4096 | 1, 8), (2**63 | 2, 8), (Rig.RAM | 1, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protection", ["NONE", "PKVM", "EMULATED"])
def test_bad_ring_is_refused_and_changes_nothing(
    bell_rig: Callable[..., Rig], protection: str, value: int, size: int
) -> None:
    rig = bell_rig(protection)
    exits = rig.script(store(BELL, value, size), load(BELL), load(BELL, 4))
    assert rig.run() == "OTHER"
    assert (exits[1].answer, exits[2].answer) == (MINUS_3, 2**32 - 3)
    assert bytes(rig.ledger) == bytes(4)
    assert (rig.vm.shares, rig.vm.refused) == (0, 1)


def test_pkvm_does_not_believe_a_share_of_a_page_it_cannot_read(bell_rig: Callable[..., Rig]) -> None:
    rig = bell_rig("PKVM")
    rig.close_view(2)
    exits = rig.script(store(BELL, rig.RAM + 2 * 4096 | 1), load(BELL))
    assert rig.run() == "OTHER"
    assert exits[1].answer == MINUS_1
    assert rig.ledger[2] == rig.lib.PV_PAGE_ABSENT


def test_emulated_ring_only_agrees_with_the_hypercall(bell_rig: Callable[..., Rig]) -> None:
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


def test_features_and_meminfo_answer_as_el2_does(emulated: Rig) -> None:
    exits = emulated.script(
        hypercall(FEATURES, 9, 9, 9), hypercall(MEMINFO), hypercall(MEMINFO, 1), hypercall(MEMINFO, 0, 0, 1)
    )
    assert emulated.run() == "OTHER"
    assert list(exits[0].out) == [0x1D, 0, 0, 0]
    assert [e.out[0] for e in exits][1:] == [4096, MINUS_3, MINUS_3]


def test_shared_page_opens_before_subscribers_hear_of_it(emulated: Rig) -> None:
    exits = emulated.script(hypercall(SHARE, emulated.RAM + 4096))
    assert emulated.run() == "SHARE"
    native = emulated.vcpus[0].native
    assert (native.share_gpa, native.share_op, native.share_source) == (
        emulated.RAM + 4096, 1, emulated.lib.PV_SOURCE_HYPERCALL,
    )  # fmt: skip
    assert emulated.memory[4096] == 0x5A
    assert [emulated.lib.pv_probe(emulated.vm, emulated.RAM + n * 4096) for n in range(4)] == [0, 1, 0, 0]
    assert emulated.run() == "OTHER"
    assert (exits[0].out[0], emulated.vm.shares) == (0, 1)
    assert emulated.vcpus[0].fake.one_regs == 4


def test_unshared_page_closes_after_subscribers_have_let_go(emulated: Rig) -> None:
    emulated.state(1, "SHARED")
    emulated.open_view(1)
    exits = emulated.script(hypercall(UNSHARE, emulated.RAM + 4096))
    assert emulated.run() == "SHARE"
    assert emulated.vcpus[0].native.share_op == 0
    assert emulated.lib.pv_probe(emulated.vm, emulated.RAM + 4096) == 1
    assert emulated.ledger[1] == emulated.lib.PV_PAGE_SHARED
    assert emulated.run() == "OTHER"
    assert exits[0].out[0] == 0
    assert emulated.lib.pv_probe(emulated.vm, emulated.RAM + 4096) == 0
    assert emulated.ledger[1] == emulated.lib.PV_PAGE_PRIVATE
    assert emulated.vm.unshares == 1


@pytest.mark.parametrize(
    ("nr", "x", "state"),
    [
        (SHARE, (Rig.RAM + 1,), "PRIVATE"), (SHARE, (Rig.RAM - 4096,), "PRIVATE"), (SHARE, (2**64 - 4096,), "PRIVATE"),
        (SHARE, (Rig.RAM, 1), "PRIVATE"), (SHARE, (Rig.RAM, 0, 1), "PRIVATE"), (SHARE, (Rig.RAM,), "SHARED"),
        (SHARE, (Rig.RAM,), "POISONED"), (UNSHARE, (Rig.RAM,), "PRIVATE"), (UNSHARE, (Rig.RAM, 0, 2**63), "SHARED"),
    ],
)  # fmt: skip
def test_what_el2_refuses_is_refused_and_changes_nothing(
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
def test_conversion_does_to_the_contents_what_it_says(emulated: Rig, conversion: str, contents: int, nr: int) -> None:
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
def test_exhausted_map_count_fails_the_call_and_leaves_the_page_as_it_was(emulated: Rig, nr: int) -> None:
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


def test_failed_punch_puts_the_view_back(emulated: Rig) -> None:
    emulated.vm.conversion = emulated.lib.PV_CONVERT_PUNCH
    emulated.vm.map.regions[0].fd = -1
    exits = emulated.script(hypercall(SHARE, emulated.RAM))
    assert emulated.run() == "OTHER"
    assert exits[0].out[0] == MINUS_1
    assert emulated.lib.pv_probe(emulated.vm, emulated.RAM) == 0


@pytest.mark.parametrize("status", [0, -1])
def test_cold_conversion_is_pythons_and_the_guest_hears_its_outcome(emulated: Rig, status: int) -> None:
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


def test_cold_unshare_tells_then_converts(emulated: Rig) -> None:
    emulated.vm.conversion = emulated.lib.PV_CONVERT_COLD
    emulated.state(0, "SHARED")
    emulated.script(hypercall(UNSHARE, emulated.RAM))
    assert [emulated.run() for _ in range(3)] == ["SHARE", "CONVERT", "OTHER"]
    assert emulated.ledger[0] == emulated.lib.PV_PAGE_PRIVATE


def test_two_vcpus_that_unshare_one_page_do_it_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(protection="EMULATED", vcpus=2)
    rig.state(0, "SHARED")
    rig.vm.subscribers = 1
    exits = [rig.script(hypercall(UNSHARE, rig.RAM), vcpu=n) for n in range(2)]
    assert [rig.run(0), rig.run(1), rig.run(0), rig.run(1)] == ["SHARE", "SHARE", "OTHER", "OTHER"]
    assert [e[0].out[0] for e in exits] == [0, MINUS_3]
    assert (rig.vm.unshares, rig.vm.refused) == (1, 1)


@pytest.mark.parametrize("protection", ["NONE", "PKVM"])
def test_hypercalls_of_other_protections_and_unknown_ones_are_pythons(
    make_rig: Callable[..., Rig], protection: str
) -> None:
    rig = make_rig(protection=protection)
    rig.script(hypercall(SHARE, rig.RAM))
    assert rig.run() == "HYPERCALL"
    other = make_rig(protection="EMULATED")
    other.script(hypercall(0x8400_0000))
    assert other.run() == "HYPERCALL"
    assert other.vcpus[0].native.value == 0x8400_0000


def test_register_that_cannot_be_read_stops_the_vcpu(emulated: Rig) -> None:
    emulated.vcpus[0].fake.one_reg_error = errno.EIO
    emulated.script(hypercall(SHARE, emulated.RAM))
    assert emulated.run() == "FAILED"
    assert emulated.vcpus[0].native.error == errno.EIO


# ---- failures of KVM_RUN


def test_failure_without_policy_stops_and_is_decoded(rig: Rig) -> None:
    rig.script(failure(errno.EFAULT, gpa=rig.RAM + 4096), failure(errno.EFAULT), failure(errno.EIO))
    native = rig.vcpus[0].native
    assert rig.run() == "FAILED"
    assert (native.error, native.failure) == (errno.EFAULT, rig.lib.PV_FAIL_MEMORY)
    assert (native.fault_gpa, native.fault_size) == (rig.RAM + 4096, 4096)
    assert rig.run() == "FAILED"
    assert (native.failure, native.fault_gpa, native.fault_size) == (rig.lib.PV_FAIL_EFAULT, 0, 0)
    assert rig.run() == "FAILED"
    assert (native.error, native.failure) == (errno.EIO, rig.lib.PV_FAIL_OTHER)
    assert [(r.kind, r.code, r.addr) for r in rig.records()] == [
        (rig.lib.PV_REC_FAULT, errno.EFAULT, rig.RAM + 4096),
        (rig.lib.PV_REC_FAULT, errno.EFAULT, 0),
        (rig.lib.PV_REC_FAULT, errno.EIO, 0),
    ]


def test_exit_reason_of_an_older_fault_is_not_taken_for_this_ones(rig: Rig) -> None:
    rig.script(failure(errno.EFAULT, gpa=rig.RAM), {"error": errno.ENOMEM, "exit_reason": 0})
    rig.run()
    assert rig.vcpus[0].area[8] == 0
    assert rig.run() == "FAILED"
    assert (rig.vcpus[0].native.failure, rig.vcpus[0].native.fault_size) == (rig.lib.PV_FAIL_ENOMEM, 0)


def test_failures_are_retried_so_often_in_a_row_and_no_more(rig: Rig) -> None:
    rig.vm.policy[rig.lib.PV_FAIL_EAGAIN] = rig.lib.PV_ACT_RETRY
    rig.vm.retry_limit = 2
    counter = rig.new("uint64_t *")
    rig.bus((DEVICE, 8, "COUNTER", counter))
    again = failure(errno.EAGAIN)
    rig.script(again, again, store(DEVICE, 1), again, again, again)
    assert rig.run() == "FAILED"
    assert (counter[0], rig.vcpus[0].fake.next) == (1, 6)


def test_punch_policy_drops_the_page_that_was_told_and_goes_on(rig: Rig) -> None:
    rig.memory[:] = b"\x11" * len(rig.memory)
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY] = rig.vm.policy[rig.lib.PV_FAIL_EFAULT] = rig.lib.PV_ACT_PUNCH
    rig.vm.retry_limit = 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM + 4096), failure(errno.EFAULT))
    assert rig.run() == "FAILED"
    assert rig.vcpus[0].native.failure == rig.lib.PV_FAIL_EFAULT
    assert rig.ledger[1] == rig.lib.PV_PAGE_HOLE
    assert [rig.memory[n * 4096] for n in range(4)] == [0x11, 0, 0x11, 0x11]


def test_protected_guests_page_is_never_punched_under_it(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(protection="PKVM")
    rig.memory[:] = b"\x11" * len(rig.memory)
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY], rig.vm.retry_limit = rig.lib.PV_ACT_PUNCH, 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM))
    assert rig.run() == "FAILED"
    assert rig.memory[0] == 0x11


def test_fault_outside_memory_cannot_be_punched(rig: Rig) -> None:
    rig.vm.policy[rig.lib.PV_FAIL_MEMORY], rig.vm.retry_limit = rig.lib.PV_ACT_PUNCH, 5
    rig.script(failure(errno.EFAULT, gpa=rig.RAM - 4096))
    assert rig.run() == "FAILED"


# ---- the rest


def test_signal_without_a_kick_is_not_seen_by_python(rig: Rig) -> None:
    rig.script(failure(errno.EINTR), failure(errno.EINTR))
    assert rig.run() == "OTHER"
    assert rig.vcpus[0].native.stats[rig.lib.PV_EXIT_INTR].count == 2


def test_kick_before_the_run_keeps_the_guest_out(rig: Rig) -> None:
    vcpu = rig.vcpus[0]
    rig.lib.pv_kick(vcpu.native)
    assert vcpu.area[1] == 1
    assert [rig.run(), rig.run()] == ["KICK", "KICK"]
    assert vcpu.fake.entered == 0
    rig.lib.pv_unkick(vcpu.native)
    assert vcpu.area[1] == 0
    assert rig.run() == "OTHER"


def test_immediate_exit_left_without_a_kick_does_not_spin(rig: Rig) -> None:
    rig.vcpus[0].area[1] = 1
    assert rig.run() == "OTHER"
    assert rig.vcpus[0].fake.entered == 2


def test_kick_does_not_lose_what_was_left_to_do(rig: Rig) -> None:
    uart = rig.pl011(tx=1)
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    rig.script(store(DEVICE, 1, 1), store(DEVICE, 2, 1))
    assert rig.run() == "FIFO"
    rig.lib.pv_kick(rig.vcpus[0].native)
    assert rig.run() == "KICK"
    rig.lib.pv_unkick(rig.vcpus[0].native)
    assert printed(rig, uart) == b"\1"
    assert rig.run() == "OTHER"
    assert printed(rig, uart) == b"\2"


def test_system_event_is_laid_open(rig: Rig) -> None:
    rig.script({"exit_reason": EXIT_SYSTEM, "nr": 2, "len": 7, "data": 50})
    assert rig.run() == "SYSTEM"
    native = rig.vcpus[0].native
    assert (native.event, native.event_count, list(native.event_data)) == (2, 4, [50, 51, 52, 53])


def test_debug_exits_and_unknown_ones_stop(rig: Rig) -> None:
    rig.script({"exit_reason": EXIT_DEBUG}, {"exit_reason": 17})
    assert [rig.run(), rig.run()] == ["DEBUG", "OTHER"]
    assert rig.vcpus[0].native.exit_reason == 17


def test_histograms_and_trace_hold_every_exit_once(rig: Rig) -> None:
    counter = rig.new("uint64_t *")
    rig.bus((DEVICE, 8, "COUNTER", counter))
    native = rig.vcpus[0].native
    native.timed = native.ring.exits = 1
    rig.script(*[store(DEVICE, 1)] * 10)
    assert rig.run() == "OTHER"
    stats = native.stats[rig.lib.PV_EXIT_MMIO_COUNTER]
    assert (stats.count, sum(stats.guest.bucket), sum(stats.vmm.bucket)) == (10, 10, 10)
    assert stats.guest_ns > 0
    records = rig.records()
    assert [(r.kind, r.code, r.addr, r.size) for r in records[:10]] == [
        (rig.lib.PV_REC_EXIT, rig.lib.PV_EXIT_MMIO_COUNTER, DEVICE, 8 | 1 << 31)
    ] * 10
    assert (records[10].code, len(records)) == (rig.lib.PV_EXIT_OTHER, 11)
    assert sum(r.value for r in records[:10]) == stats.guest_ns


def test_counts_are_kept_without_histograms(rig: Rig) -> None:
    rig.bus((DEVICE, 8, "COUNTER", rig.new("uint64_t *")))
    rig.script(*[store(DEVICE, 1)] * 3)
    rig.run()
    stats = rig.vcpus[0].native.stats[rig.lib.PV_EXIT_MMIO_COUNTER]
    assert (stats.count, stats.guest_ns, sum(stats.guest.bucket)) == (3, 0, 0)
    assert rig.records() == []
