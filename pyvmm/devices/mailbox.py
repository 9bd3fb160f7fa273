# SPDX-License-Identifier: Apache-2.0
"""The mailboxes of the vCPUs: orders to a puppet, answers, and the report of a trap.

Owns ``struct pv_mailbox[]``. The native loop serves the registers. Python runs only when a vCPU waits for an order
(:meth:`Mailboxes.serve`, in that vCPU's thread), or a caller sends one (:meth:`Mailboxes.submit`, any thread).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from pyvmm import abi
from pyvmm._native import ffi, lib
from pyvmm.devices.base import Device
from pyvmm.errors import PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Any

    from pyvmm._native import pv_mailbox
    from pyvmm.devices.trap import MailboxAnswer, Trap

WORDS = 7
STRIDE = 0x1000
"""Bytes of registers for each vCPU."""
MASK = (1 << 64) - 1


class MachineGone(PyvmmError):
    """The guest will not answer: it or the machine has stopped, or it dropped the order."""


class Mailboxes(Device):
    """One 4 KiB page of registers for each vCPU."""

    name = "mailbox"
    compatible = "pyvmm,mailbox"
    kind = lib.PV_KIND_MAILBOX

    def __init__(self, cpus: int) -> None:
        super().__init__(size=STRIDE * cpus)
        self.state = self._boxes = ffi.new("struct pv_mailbox[]", cpus)
        self._changed = threading.Condition()
        self._waiting: list[deque[tuple[list[int], Future[MailboxAnswer]]]] = [deque() for _ in range(cpus)]
        self._current: list[Future[MailboxAnswer] | None] = [None] * cpus
        self._gone: str | None = None

    # -- the sender

    def submit(self, vcpu: int, op: int, args: Sequence[int] = ()) -> Future[MailboxAnswer]:
        """Queue an order for ``vcpu`` and return the pending answer. Raises MachineGone if the machine has stopped."""
        if len(args) > WORDS:
            raise ValueError(f"an order has at most {WORDS} arguments, not {len(args)}")
        words = [arg & MASK for arg in args]
        while words and not words[-1]:
            words.pop()
        words.insert(0, op | len(words) << abi.MAILBOX_ARGS_SHIFT)
        from concurrent.futures import Future  # a slow import, needed only for guests that take orders

        future: Future[MailboxAnswer] = Future()
        with self._changed:
            if self._gone is not None:
                raise MachineGone(f"vCPU {vcpu} takes no orders: {self._gone}")
            self._waiting[vcpu].append((words, future))
            self._changed.notify_all()
        return future

    # -- the vCPU's thread

    def trap(self, vcpu: int) -> Trap | None:
        """Return the trap that the vectors of ``vcpu`` reported, or None."""
        from pyvmm.devices.trap import Trap  # as above

        box = self._boxes[vcpu]
        return Trap.from_words(tuple(box.trap)) if box.trapped else None

    def notes(self, vcpu: int = 0) -> tuple[int, ...]:
        """Return the words that a payload stored for its runner."""
        return tuple(self._boxes[vcpu].note)

    def serve(self, vcpu: int, leave: Callable[[], bool]) -> None:
        """Deliver the last answer of ``vcpu`` and wait for its next order, until ``leave()`` is true."""
        box = self._boxes[vcpu]
        if box.state == lib.PV_MAILBOX_DONE:
            self._answer(vcpu, box)
        elif (dropped := self._current[vcpu]) is not None:
            self._current[vcpu] = None
            dropped.set_exception(MachineGone(f"vCPU {vcpu} asked for its next order without answering the last"))
        with self._changed:
            while not self._waiting[vcpu]:
                if leave():
                    return
                self._changed.wait()
            words, self._current[vcpu] = self._waiting[vcpu].popleft()
        for index, word in enumerate(words + [0] * (WORDS + 1 - len(words))):
            box.order[index] = word
            box.result[index] = 0
        box.state = lib.PV_MAILBOX_ORDER

    def _answer(self, vcpu: int, box: pv_mailbox) -> None:
        from pyvmm.devices.trap import MailboxAnswer, Trap

        status, *results = box.result
        trap = Trap.from_words(tuple(box.trap)) if status == 1 else None
        box.state = lib.PV_MAILBOX_IDLE
        future, self._current[vcpu] = self._current[vcpu], None
        if future is not None:
            future.set_result(MailboxAnswer(status, tuple(results), trap))

    def wake(self) -> None:
        """Make every waiting vCPU check ``leave()`` again."""
        with self._changed:
            self._changed.notify_all()

    def abandon(self, why: str) -> None:
        """Fail every order without an answer, because the machine stopped."""
        with self._changed:
            self._gone = why
            left = [future for future in self._current if future is not None]
            left += [future for queue in self._waiting for _, future in queue]
            self._current = [None] * len(self._current)
            for queue in self._waiting:
                queue.clear()
            self._changed.notify_all()
        for future in left:
            future.set_exception(MachineGone(f"the guest did not answer: {why}"))

    def save(self) -> dict[str, Any]:
        """Return the guest's state of every mailbox, without the waiting senders."""
        return {"boxes": bytes(ffi.buffer(self._boxes)).hex()}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the mailboxes. Raises UsageError for another number of them."""
        from pyvmm.schema import BYTES, check

        check(saved, {"boxes": BYTES}, self.name)
        data, room = bytes.fromhex(saved["boxes"]), ffi.buffer(self._boxes)
        if len(data) != len(room):
            raise UsageError(f"{len(data)} bytes of mailboxes were saved, but this machine has {len(room)}")
        room[:] = data
