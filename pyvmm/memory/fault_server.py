# SPDX-License-Identifier: Apache-2.0
"""A thread that answers the page faults of a userfaultfd with what a callback says.

The callback runs in the thread. It must not touch a page that only this server can answer.
"""

from __future__ import annotations

import contextlib
import errno
import select
from collections import Counter
from collections.abc import Callable
from enum import Enum
from typing import TypeAlias

from pyvmm.errors import PyvmmError, hex_
from pyvmm.memory.address import PAGE_SIZE, is_aligned
from pyvmm.memory.fault_thread import FaultThread
from pyvmm.memory.userfault import Fault, FaultKind, Userfault, UserfaultError


class Answer(Enum):
    """What to do about a fault, where it is not new contents."""

    ZERO = "zero"
    """Give a page of zeros (missing)."""
    CONTINUE = "continue"
    """Map the page that the file has (minor)."""
    UNPROTECT = "unprotect"
    """Let the access go on (wp, rwp)."""


Resolve: TypeAlias = "Callable[[Fault], bytes | bytearray | memoryview | Answer]"
"""Answers a fault; bytes are whole pages from ``fault.page`` on."""


class Server(FaultThread):
    """A thread that answers the faults of one ``Userfault``. Stop it, or use it as a context manager.

    A fault whose ``resolve`` raises, or answers what cannot be, stays unanswered and its thread waits, so that no guest
    runs on with contents that are not its own; ``failed`` hears of it in the server's thread (to stop the machine,
    say), and leaving the context raises the first such error. What is not answered when the server stops waits too.
    """

    def __init__(
        self, userfault: Userfault, resolve: Resolve, *, failed: Callable[[BaseException], None] | None = None
    ) -> None:
        super().__init__(userfault)
        self.served: Counter[FaultKind] = Counter()
        """Faults answered, by kind."""
        self.late = 0
        """Those of them whose page had come meanwhile, by the answer to another."""
        self.failures = 0
        """Faults left unanswered, because ``resolve`` raised or answered what cannot be."""
        self._resolve = resolve
        self._failed = failed
        self._start()

    def _main(self) -> None:
        poll = select.poll()
        for fd in (self.userfault.fd, self._wake):
            poll.register(fd, select.POLLIN)
        while not self._stopping:
            poll.poll()
            try:
                faults = [] if self._stopping else self.userfault.read()
            except BaseException as error:
                self._fail(error)
                return
            for fault in faults:
                try:
                    self._serve(fault)
                except BaseException as error:
                    self._fail(error)

    def _serve(self, fault: Fault) -> None:
        if self._stopping:
            # Read but not answered: its thread tries again, and the next server hears of it.
            self.userfault.wake(fault.page, PAGE_SIZE)
            return
        answer = self._resolve(fault)
        # Counted first: who was waiting may look at once.
        self.served[fault.kind] += 1
        try:
            self._answer(fault, answer)
        except BaseException:
            self.served[fault.kind] -= 1
            raise

    def _fail(self, error: BaseException) -> None:
        self.failures += 1
        self.error = self.error or error
        if self._failed:
            # It is told; what it raises itself can go nowhere.
            with contextlib.suppress(Exception):
                self._failed(error)

    def _answer(self, fault: Fault, answer: bytes | bytearray | memoryview | Answer) -> None:
        userfault, page = self.userfault, fault.page
        match answer, fault.kind:
            case Answer.UNPROTECT, FaultKind.WP:
                userfault.write_protect(page, on=False)
            case Answer.UNPROTECT, FaultKind.RWP:
                userfault.rwprotect(page, on=False)
            case Answer.CONTINUE, FaultKind.MINOR:
                self._unless_there(lambda: userfault.continue_(page), page)
            case Answer.ZERO, FaultKind.MISSING:
                self._unless_there(lambda: userfault.zeropage(page), page)
            case (bytes() | bytearray() | memoryview()) as data, FaultKind.MISSING:
                if not data or not is_aligned(len(data)):
                    raise PyvmmError(f"the answer to a fault at {hex_(page)} is {len(data)} bytes: whole pages needed")
                self._pages(page, memoryview(data))
            case _:
                said = answer if isinstance(answer, Answer) else type(answer).__name__
                raise PyvmmError(f"{said} is no answer to a {fault.kind.value} fault, as at {hex_(page)}")

    def _pages(self, page: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                self.userfault.copy(page + done, data[done:])
                return
            except UserfaultError as error:
                if error.errno != errno.EEXIST:
                    raise
                done += error.done
                self.late += done == 0
            self.userfault.wake(page + done, PAGE_SIZE)
            done += PAGE_SIZE

    def _unless_there(self, put: Callable[[], None], page: int) -> None:
        try:
            put()
        except UserfaultError as error:
            if error.errno != errno.EEXIST:
                raise
            self.late += 1
            self.userfault.wake(page, PAGE_SIZE)
