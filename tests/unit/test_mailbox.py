# SPDX-License-Identifier: Apache-2.0
"""Mailboxes: orders reach the waiting vCPU, answers reach the caller, and nobody waits for a dead machine."""

from __future__ import annotations

import threading

import pytest

from pyvmm import abi
from pyvmm._native import lib
from pyvmm.devices.mailbox import MachineGone, Mailboxes


class Guest:
    """Plays the vCPU's side of one mailbox: `serve` takes an order, and answers it with the sum of its arguments."""

    def __init__(self, boxes: Mailboxes, vcpu: int = 0, status: int = 0) -> None:
        self.boxes, self.vcpu, self.leaving = boxes, vcpu, False
        self.box = boxes._boxes[vcpu]
        self.status = status
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while True:
            self.boxes.serve(self.vcpu, lambda: self.leaving)
            if self.box.state != lib.PV_MAILBOX_ORDER:
                return
            words = list(self.box.order)
            self.box.result[0], self.box.result[1] = self.status, sum(words[1:])
            for index in range(8):
                self.box.trap[index] = 0x100 + index
            self.box.state = lib.PV_MAILBOX_DONE

    def leave(self) -> None:
        self.leaving = True
        self.boxes.wake()
        self.thread.join(5)
        assert not self.thread.is_alive()


def test_an_order_is_answered_with_its_results() -> None:
    boxes = Mailboxes(2)
    guest = Guest(boxes, vcpu=1)
    assert boxes.submit(1, 7, (1, 2, 39)).result(5).results[0] == 42
    assert boxes.submit(1, 7, (5,)).result(5).results[0] == 5
    guest.leave()


def test_an_order_has_the_number_of_its_arguments() -> None:
    boxes = Mailboxes(1)
    for args, count in (((), 0), ((5,), 1), ((0, 6), 2), ((7, 0, 0), 1), ((0,), 0), ((1,) * 7, 7)):
        boxes.submit(0, 3, args)
        boxes.serve(0, lambda: True)
        box = boxes._boxes[0]
        assert list(box.order) == [3 | count << abi.MAILBOX_ARGS_SHIFT, *args, *[0] * (7 - len(args))]


def test_results_that_a_guest_does_not_store_are_0() -> None:
    boxes = Mailboxes(1)
    box = boxes._boxes[0]
    first = boxes.submit(0, 3)
    boxes.serve(0, lambda: True)
    box.result[2] = 9
    box.state = lib.PV_MAILBOX_DONE
    second = boxes.submit(0, 3)
    boxes.serve(0, lambda: True)
    box.state = lib.PV_MAILBOX_DONE
    boxes.serve(0, lambda: True)
    assert [each.result(5).results for each in (first, second)] == [(0, 9, 0, 0, 0, 0, 0), (0,) * 7]


def test_negative_arguments_are_sent_as_64_bit_words() -> None:
    boxes = Mailboxes(1)
    guest = Guest(boxes)
    assert boxes.submit(0, 1, (-1,)).result(5).results[0] == (1 << 64) - 1
    guest.leave()


def test_a_trapped_order_carries_the_trap() -> None:
    boxes = Mailboxes(1)
    guest = Guest(boxes, status=1)
    answer = boxes.submit(0, 1).result(5)
    assert answer.status == 1
    assert answer.trap is not None
    assert (answer.trap.esr, answer.trap.far, answer.trap.elr) == (0x101, 0x102, 0x103)
    guest.leave()


def test_orders_fail_when_the_machine_goes_away() -> None:
    boxes = Mailboxes(1)
    future = boxes.submit(0, 1)
    boxes.abandon("it crashed")
    with pytest.raises(MachineGone, match="it crashed"):
        future.result(1)
    with pytest.raises(MachineGone, match="it crashed"):
        boxes.submit(0, 1)


def test_more_than_seven_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="7"):
        Mailboxes(1).submit(0, 1, range(8))


def test_a_kicked_vcpu_stops_waiting() -> None:
    boxes = Mailboxes(1)
    Guest(boxes).leave()


def test_the_host_does_not_wait_for_an_order_that_the_guest_forgot() -> None:
    boxes = Mailboxes(1)
    first, second = boxes.submit(0, 1), boxes.submit(0, 2)
    boxes.serve(0, lambda: False)
    boxes._boxes[0].state = lib.PV_MAILBOX_BUSY
    boxes.serve(0, lambda: False)  # it asks for the next order without DONE
    with pytest.raises(MachineGone, match="without answering"):
        first.result(1)
    assert not second.done()
