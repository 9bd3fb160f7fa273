# SPDX-License-Identifier: Apache-2.0
"""The loop's MMIO kinds one by one, in a fake kernel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.fake_kvm import load, printed, store

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fake_kvm import Rig

DEVICE = 0x0930_0000
MINUS_1 = 2**64 - 1


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK)


def rung(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# ---- MMIO


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1, 8, 15])
def test_registers_keep_stored_values(rig: Rig, size: int, offset: int) -> None:
    state = rig.new("uint8_t[]", 32)
    rig.bus((DEVICE, 32, "REGISTERS", state))
    exits = rig.script(store(DEVICE + offset, 0x8877_6655_4433_2211, size), load(DEVICE + offset, size))
    assert rig.run() == "OTHER"
    assert exits[1].answer == 0x8877_6655_4433_2211 & (1 << 8 * size) - 1
    assert bytes(state) == bytes(offset) + 0x8877_6655_4433_2211.to_bytes(8, "little")[:size] + bytes(
        32 - offset - size
    )


def test_an_access_across_the_end_of_a_range_is_unclaimed(rig: Rig) -> None:
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


def test_accesses_between_ranges_and_on_an_empty_bus_are_unclaimed(rig: Rig) -> None:
    rig.script(load(DEVICE), load(DEVICE + 0x1800), load(DEVICE + 0x3000))
    assert rig.run() == "UNCLAIMED"
    rig.bus((DEVICE, 0x1000, "COUNTER", rig.new("uint64_t *")), (DEVICE + 0x2000, 0x1000, "COLD", None))
    assert rig.run() == "UNCLAIMED"
    assert rig.vcpus[0].native.gpa == DEVICE + 0x1800
    assert rig.run() == "UNCLAIMED"
    assert rig.vcpus[0].native.gpa == DEVICE + 0x3000


def test_a_replaced_bus_is_used_from_the_next_exit(rig: Rig) -> None:
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


def test_a_doorbell_rings_only_the_matching_slot(rig: Rig) -> None:
    fds = [eventfd() for _ in range(3)]
    slots = rig.new(
        "struct pv_doorbell_slot[]",
        [(0x50, 1, fds[0], 0), (0x50, 2, fds[1], 0), (0x58, 0, fds[2], 1)],
    )
    bell = rig.new("struct pv_doorbell *", {"count": 3, "slots": slots})
    rig.bus((DEVICE, 0x1000, "DOORBELL", bell))
    exits = rig.script(
        store(DEVICE + 0x50, 2, 4),
        store(DEVICE + 0x50, 2, 4),
        store(DEVICE + 0x50, 3, 4),
        store(DEVICE + 0x58, 77, 2),
        store(DEVICE + 0x60, 1, 4),
        load(DEVICE + 0x50, 4),
    )
    exits[5].data = MINUS_1
    assert rig.run() == "OTHER"
    assert [rung(fd) for fd in fds] == [0, 2, 1]
    assert bell.missed == 2
    assert exits[5].answer == 0


def test_a_coalescing_doorbell_is_written_once_until_it_is_read(rig: Rig) -> None:
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


def test_a_break_has_its_flag_in_the_data_register_and_one_waits_at_a_time(rig: Rig) -> None:
    uart = rig.pl011()
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    rig.lib.pv_pl011_feed(uart, b"a", 1)
    assert rig.lib.pv_pl011_break(uart) == 1
    assert rig.lib.pv_pl011_break(uart) == 0
    rig.lib.pv_pl011_feed(uart, b"h", 1)
    exits = rig.script(*[load(DEVICE, 4) for _ in range(4)])
    assert rig.run() == "OTHER"
    assert [exits[n].answer for n in range(4)] == [ord("a"), 1 << 10, ord("h"), 0]
    assert rig.lib.pv_pl011_break(uart) == 1


def test_the_uart_carries_bytes_both_ways_and_its_flags_agree(rig: Rig) -> None:
    uart = rig.pl011()
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    rig.lib.pv_pl011_feed(uart, b"ab", 2)
    exits = rig.script(
        *[store(DEVICE, c, 1) for c in b"hi"],
        load(DEVICE + 0x18, 4),
        load(DEVICE, 4),
        load(DEVICE, 4),
        load(DEVICE + 0x18, 4),
        load(DEVICE, 4),
    )
    assert rig.run() == "OTHER"
    assert printed(rig, uart) == b"hi"
    assert [exits[n].answer for n in range(2, 7)] == [0xC0, ord("a"), ord("b"), 0x90, 0]


def test_a_full_uart_stops_the_loop_and_loses_or_repeats_no_byte(rig: Rig) -> None:
    uart = rig.pl011(tx=4)
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    text = bytes(range(64, 87))
    rig.script(*[store(DEVICE, c, 1) for c in text])
    got, stops = b"", 0
    while (stop := rig.run()) == "FIFO":
        stops += 1
        if stops % 3 == 0:
            continue  # re-enter without draining: it must stop again
        got += printed(rig, uart, stops % 3 * 2)
    got += printed(rig, uart)
    assert stop == "OTHER"
    assert got == text
    assert rig.ranges[0].writes == len(text)
    assert rig.vcpus[0].native.stats[rig.lib.PV_EXIT_MMIO_PL011].count == len(text)


def with_line(rig: Rig) -> tuple[Any, Any]:
    """Make a UART and the fake kernel's interrupt line that it drives."""
    uart = rig.pl011()
    uart.vm_fd, uart.irq = 0, 5
    rig.bus((DEVICE, 0x1000, "PL011", uart))
    return uart, rig.line(5)


def moves(line: Any) -> tuple[int, int]:
    return line.raised, line.lowered


def test_the_uart_interrupt_stays_raised_until_its_cause_is_gone(rig: Rig) -> None:
    uart, line = with_line(rig)
    rig.script(store(DEVICE + 0x38, 0x50, 4))
    rig.run()
    assert moves(line) == (0, 0)
    for byte in b"xy":
        rig.lib.pv_pl011_feed(uart, bytes([byte]), 1)
    assert moves(line) == (1, 0)
    exits = rig.script(load(DEVICE + 0x40, 4), store(DEVICE + 0x44, 0x7FF, 4), load(DEVICE + 0x3C, 4), load(DEVICE, 4))
    rig.run()
    assert [exits[n].answer for n in (0, 2)] == [0x10, 0x10]
    assert moves(line) == (1, 0)
    exits = rig.script(load(DEVICE, 4), load(DEVICE + 0x40, 4))
    rig.run()
    assert exits[1].answer == 0
    assert moves(line) == (1, 1)
    rig.lib.pv_pl011_feed(uart, b"z", 1)
    assert moves(line) == (2, 1)


def test_a_byte_sets_the_transmit_interrupt_and_icr_clears_it(rig: Rig) -> None:
    _, line = with_line(rig)
    exits = rig.script(
        store(DEVICE, 65, 1),
        load(DEVICE + 0x3C, 4),
        load(DEVICE + 0x40, 4),
        store(DEVICE + 0x38, 0x20, 4),
        load(DEVICE + 0x40, 4),
        store(DEVICE + 0x44, 0x20, 4),
        load(DEVICE + 0x3C, 4),
    )
    rig.run()
    assert [exits[n].answer for n in (1, 2, 4, 6)] == [0x20, 0, 0x20, 0]
    assert moves(line) == (1, 1)


def test_masking_an_interrupt_lowers_its_line_and_unmasking_raises_it_again(rig: Rig) -> None:
    _, line = with_line(rig)
    rig.script(store(DEVICE, 65, 1), *[store(DEVICE + 0x38, mask, 4) for mask in (0x20, 0, 0x20, 0x7FF, 0)])
    rig.run()
    assert moves(line) == (2, 2)


def test_the_uart_has_the_id_registers_of_a_pl011(rig: Rig) -> None:
    rig.bus((DEVICE, 0x1000, "PL011", rig.pl011()))
    exits = rig.script(*[load(DEVICE + 0xFE0 + 4 * n, 4) for n in range(8)])
    rig.run()
    ids = [e.answer for e in exits]
    # Linux, include/linux/amba/bus.h: part 0x011, designer 0x41 (Arm), then the PrimeCell cell id
    assert sum(ids[n] << 8 * n for n in range(4)) & 0x000F_FFFF == 0x0004_1011
    assert sum(ids[4 + n] << 8 * n for n in range(4)) == 0xB105_F00D


def test_uart_registers_keep_only_valid_bits_and_odd_accesses_have_no_effect(rig: Rig) -> None:
    rig.bus((DEVICE, 0x1000, "PL011", rig.pl011()))
    bits = {0x20: 0xFF, 0x24: 0xFFFF, 0x28: 0x3F, 0x2C: 0xFF, 0x30: 0xFFFF, 0x34: 0x3F, 0x38: 0x7FF, 0x48: 7}
    exits = rig.script(
        *[store(DEVICE + offset, 0xFFFF_FFFF, 4) for offset in bits],
        *[load(DEVICE + offset, 4) for offset in bits],
        store(DEVICE + 0x31, 0, 1),
        store(DEVICE + 0x30, 0, 8),
        load(DEVICE + 0x30, 4),
        load(DEVICE + 0x30, 8),
        load(DEVICE + 0x50, 4),
    )
    rig.run()
    assert [exits[len(bits) + n].answer for n in range(len(bits))] == list(bits.values())
    assert [exits[2 * len(bits) + n].answer for n in (2, 3, 4)] == [0xFFFF, 0, 0]


# ---- mailbox


def test_the_puppet_gets_its_order_and_returns_results(rig: Rig) -> None:
    box = rig.new("struct pv_mailbox[]", 1)
    rig.bus((DEVICE, 0x1000, "MAILBOX", box))
    exits = rig.script(
        load(DEVICE),
        load(DEVICE + 8),
        load(DEVICE + 0x38),
        store(DEVICE + 0x40, 11),
        store(DEVICE + 0x70, 17),
        store(DEVICE + 0x78, 1),
        store(DEVICE + 0xC8, 5),
        store(DEVICE + 0xE0, 8),
        load(DEVICE),
    )
    assert rig.run() == "MAILBOX"
    assert rig.run() == "MAILBOX"  # there is still no order
    box[0].order = [42, 1, 2, 3, 4, 5, 6, 7]
    box[0].state = rig.lib.PV_MAILBOX_ORDER
    assert rig.run() == "MAILBOX"
    assert [exits[n].answer for n in range(3)] == [42, 1, 7]
    assert (box[0].state, list(box[0].result)) == (rig.lib.PV_MAILBOX_DONE, [1, 11, 0, 0, 0, 0, 0, 17])
    assert list(box[0].note) == [5, 0, 0, 8]
    assert (rig.ranges[0].reads, rig.ranges[0].writes) == (4, 5)


def test_a_trap_stops_the_loop_with_its_registers(rig: Rig) -> None:
    box = rig.new("struct pv_mailbox[]", 1)
    rig.bus((DEVICE, 0x1000, "MAILBOX", box))
    rig.script(*[store(DEVICE + 0x80 + 8 * n, 100 + n) for n in range(8)], store(DEVICE + 0xC0, 0))
    assert rig.run() == "MAILBOX"
    assert box[0].trapped == 1
    assert list(box[0].trap) == list(range(100, 108))


def test_a_vcpu_can_access_only_its_own_mailbox(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(vcpus=2)
    box = rig.new("struct pv_mailbox[]", 2)
    box[0].state, box[0].order = rig.lib.PV_MAILBOX_ORDER, [7] * 8
    rig.bus((DEVICE, 0x2000, "MAILBOX", box))
    exits = rig.script(load(DEVICE), store(DEVICE + 0xC0, 0), store(DEVICE + 0x1000 + 0x90, 9), vcpu=1)
    assert rig.run(1) == "OTHER"
    assert (exits[0].answer, box[0].state, box[0].trapped) == (0, rig.lib.PV_MAILBOX_ORDER, 0)
    assert box[1].trap[2] == 9


@pytest.mark.parametrize("access", [load(DEVICE, 4), load(DEVICE + 4, 8), store(DEVICE + 0x78, 1), load(DEVICE + 0xE8)])
def test_the_mailbox_ignores_partial_registers_and_accesses_out_of_turn(rig: Rig, access: dict[str, Any]) -> None:
    box = rig.new("struct pv_mailbox[]", 1)
    box[0].state, box[0].order = rig.lib.PV_MAILBOX_ORDER, [7] * 8
    rig.bus((DEVICE, 0x1000, "MAILBOX", box))
    exits = rig.script(access)
    assert rig.run() == "OTHER"
    assert (box[0].state, exits[0].answer) == (rig.lib.PV_MAILBOX_ORDER, 0)
