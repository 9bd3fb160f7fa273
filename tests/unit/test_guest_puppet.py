# SPDX-License-Identifier: Apache-2.0
"""The handle gives the right orders and reads answers correctly. A scripted mailbox plays the guest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest

from pyvmm import abi
from pyvmm.devices.trap import MailboxAnswer, Trap
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.guest.orders import Access, GuestFault, GuestRefused, GuestSilent, Series, Timed, Touch, What
from pyvmm.guest.puppet import Puppet

PAGE = 0x8100_0000
Play = Callable[[int, int, list[int]], MailboxAnswer | None]


class Mailbox:
    """Records orders, and answers each at once with the result of ``play``, or never."""

    def __init__(self, play: Play) -> None:
        self.orders: list[tuple[int, int, list[int]]] = []
        self._play = play

    def submit(self, vcpu: int, op: int, args: Sequence[int] = ()) -> Future[MailboxAnswer]:
        self.orders.append((vcpu, op, list(args)))
        future: Future[MailboxAnswer] = Future()
        answer = self._play(vcpu, op, list(args))
        if answer is not None:
            future.set_result(answer)
        return future


def answering(*words: int, status: int = abi.STATUS_OK, trap: Trap | None = None) -> tuple[Puppet, Mailbox]:
    results = (*words, *[0] * (7 - len(words)))
    box = Mailbox(lambda *_: MailboxAnswer(status, results, trap))
    return Puppet(box, timeout=0.01), box


def test_a_load_is_one_order_and_gives_value_and_ticks() -> None:
    guest, box = answering(0x1234, 56)
    assert guest.timed_read(PAGE, 2) == Timed(0x1234, 56)
    assert box.orders == [(0, abi.OP_READ, [PAGE, 2])]


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_each_width_asks_for_its_bytes(bits: int) -> None:
    guest, box = answering(7)
    assert getattr(guest, f"read{bits}")(PAGE) == 7
    assert getattr(guest, f"write{bits}")(PAGE, 9) == 7
    assert box.orders == [(0, abi.OP_READ, [PAGE, bits // 8]), (0, abi.OP_WRITE, [PAGE, bits // 8, 9])]


def test_the_handle_refuses_an_odd_width() -> None:
    guest, box = answering()
    with pytest.raises(UsageError, match="not 3"):
        guest.timed_read(PAGE, 3)
    assert box.orders == []


def test_a_trapped_order_raises_with_the_trap() -> None:
    trap = Trap(4, 0x9600_0004, PAGE, 0x8008_0000, 0, 0, 0, 0)
    guest, _ = answering(status=abi.STATUS_TRAPPED, trap=trap)
    with pytest.raises(GuestFault, match=r"OP_READ\(0x8100_0000, 0x8\) on vCPU 0 trapped: data abort: load") as caught:
        guest.read64(PAGE)
    assert caught.value.trap is trap
    assert caught.value.exit_status == 3


def test_an_unknown_order_is_not_taken_for_an_answer() -> None:
    guest, _ = answering(status=abi.STATUS_UNKNOWN)
    with pytest.raises(PyvmmError, match="does not know this order"):
        guest.start(99).result()


def test_the_error_for_a_silent_guest_has_the_order_and_the_time() -> None:
    guest = Puppet(Mailbox(lambda *_: None), vcpu=3, timeout=0.01)
    with pytest.raises(GuestSilent, match=r"OP_PING\(\) on vCPU 3 was not answered within 0.01 s"):
        guest.ping()


def test_an_order_can_be_asynchronous() -> None:
    guest, _ = answering(5)
    order = guest.start_hammer(PAGE, 4096, 5, Access.WRITE)
    assert order.done()
    assert order.result() == 5


@pytest.mark.parametrize("word", [(1 << 64) - 3])
def test_a_refused_share_names_the_page_that_was_refused(word: int) -> None:
    guest, box = answering(word, 2, 10)
    with pytest.raises(GuestRefused, match="share of gpa 0x8100_2000 was refused: -3") as caught:
        guest.share(PAGE, 4)
    assert caught.value.status == -3
    assert guest.unshare(PAGE, 4, check=False).status == -3
    both = abi.SHARE_HVC | abi.SHARE_BELL
    assert box.orders == [(0, abi.OP_SHARE, [PAGE, 4, both]), (0, abi.OP_UNSHARE, [PAGE, 4, both])]


def test_the_error_has_the_psci_reason_why_a_vcpu_does_not_start() -> None:
    guest, _ = answering((1 << 64) - 4)
    with pytest.raises(GuestRefused, match=r"CPU_ON of vCPU 1 was refused: -4 \(ALREADY_ON\)"):
        guest.cpu_on(1)


def test_a_started_vcpu_gets_its_own_mailbox() -> None:
    guest, box = answering(0)
    guest.cpu_on(2).ping()
    assert [(vcpu, op) for vcpu, op, _ in box.orders] == [(0, abi.OP_CPU_ON), (2, abi.OP_PING)]


def test_one_order_reads_seven_words() -> None:
    memory = {PAGE + 8 * n: n for n in range(100)}

    def play(_: int, op: int, args: list[int]) -> MailboxAnswer:
        assert op == abi.OP_WORDS
        assert args[1] <= 7
        words = [memory[args[0] + 8 * n] for n in range(args[1])]
        return MailboxAnswer(abi.STATUS_OK, (*words, *[0] * (7 - len(words))))

    box = Mailbox(play)
    assert Puppet(box).words(PAGE, 16) == tuple(range(16))
    assert len(box.orders) == 3


def test_the_guest_reads_back_the_ticks_of_each_page() -> None:
    def play(_: int, op: int, args: list[int]) -> MailboxAnswer:
        if op == abi.OP_TOUCH:
            return MailboxAnswer(abi.STATUS_OK, (3, 60, 30, 0, 0, 0, 0))
        assert args == [0x8200_0000, 3]
        return MailboxAnswer(abi.STATUS_OK, (10 | 2 << 32, 20 | 0 << 32, 30 | 1 << 32, 0, 0, 0, 0))

    box = Mailbox(play)
    touched = Puppet(box).touch(PAGE, 3, access=Access.WRITE, seed=9, ticks_at=0x8200_0000)
    assert touched == Touch(3, 60, 30, (10, 20, 30), (1, 2, 0))
    assert box.orders[0] == (0, abi.OP_TOUCH, [PAGE, 3, 1, abi.ACCESS_WRITE, 9, 0x8200_0000])


def test_the_error_for_a_refused_series_says_how_far_it_got() -> None:
    guest, box = answering(-3 & (1 << 64) - 1, 5, 900)
    assert guest.series(What.SHARE, PAGE, 9, stride=4096, ticks_at=0x8200_0000) == Series(-3, 5, 900)
    assert box.orders == [(0, abi.OP_SERIES, [abi.SERIES_SHARE, PAGE, 9, 4096, 0, 0x8200_0000])]


def test_the_value_that_means_loads_cannot_be_stored_by_mistake() -> None:
    guest, box = answering(1)
    with pytest.raises(UsageError, match="means a load in this order"):
        guest.mmio(PAGE, value=-1)
    guest.mmio(PAGE, 10)
    assert box.orders == [(0, abi.OP_MMIO, [PAGE, 8, 10, (1 << 64) - 1])]


def test_the_handle_does_not_wait_for_an_order_without_an_answer() -> None:
    box = Mailbox(lambda *_: None)
    guest = Puppet(box)
    guest.cpu_off()
    guest.reset()
    guest.off()
    assert [op for _, op, _ in box.orders] == [abi.OP_CPU_OFF, abi.OP_RESET, abi.OP_OFF]


def test_a_counted_order_answers_how_often_it_was_done() -> None:
    guest, box = answering(12)
    assert guest.start_count(PAGE, 20, until=PAGE + 8).result() == 12
    assert guest.start_count(PAGE, 12).result() == 12
    assert box.orders == [(0, abi.OP_COUNT, [PAGE, 20, PAGE + 8]), (0, abi.OP_COUNT, [PAGE, 12, 0])]


def test_a_ping_tells_where_the_guests_translation_table_is() -> None:
    guest, _ = answering(3, 4, 0x1005, 1000, PAGE)
    assert guest.ping() == (3, 1, 0x1005, 1000, PAGE)
