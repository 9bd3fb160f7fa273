# SPDX-License-Identifier: Apache-2.0
"""Answer the page faults of a userfaultfd in a thread, with a callback.

The callback runs in the thread. It must not access a page whose fault only this server can answer.
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
from pyvmm.memory.address import is_aligned
from pyvmm.memory.fault_thread import FaultThread
from pyvmm.memory.userfault import Fault, FaultKind, Userfault, UserfaultError
from pyvmm.pages import HOST_PAGE


class Answer(Enum):
    """Answers to a fault other than new contents."""

    ZERO = "zero"
    """Give a page of zeros (missing)."""
    CONTINUE = "continue"
    """Map the file's page (minor)."""
    UNPROTECT = "unprotect"
    """Let the access continue (wp, rwp)."""


Resolve: TypeAlias = "Callable[[Fault], bytes | bytearray | memoryview | Answer]"
"""Answers a fault. Bytes are whole pages from ``fault.page``."""


class Server(FaultThread):
    """A thread that answers the faults of one ``Userfault``. Stop it, or use it as a context manager.

    If ``resolve`` raises or returns an invalid answer, the fault stays unanswered and its thread waits. So no guest
    runs on with wrong contents. The server's thread then calls ``failed``, for example to stop the machine. Leaving the
    context raises the first such error. Faults without an answer when the server stops also wait.
    """

    def __init__(
        self, userfault: Userfault, resolve: Resolve, *, failed: Callable[[BaseException], None] | None = None
    ) -> None:
        super().__init__(userfault)
        self.served: Counter[FaultKind] = Counter()
        """Faults answered, by kind."""
        self.late = 0
        """Answered faults whose page had already arrived, through another fault's answer."""
        self.failures = 0
        """Faults left unanswered: ``resolve`` raised, or returned an invalid answer."""
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
            # Read but not answered: wake its thread, which faults again for the next server.
            self.userfault.wake(fault.page, HOST_PAGE)
            return
        answer = self._resolve(fault)
        # Count first: the waiting thread may read the counter at once.
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
            # An exception of the callback itself has no receiver.
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
                    raise PyvmmError(
                        f"the answer to a fault at {hex_(page)} is {len(data)} bytes, which are not whole pages"
                    )
                self._pages(page, memoryview(data))
            case _:
                said = answer if isinstance(answer, Answer) else type(answer).__name__
                raise PyvmmError(f"{said} is not a valid answer to the {fault.kind.value} fault at {hex_(page)}")

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
            self.userfault.wake(page + done, HOST_PAGE)
            done += HOST_PAGE

    def _unless_there(self, put: Callable[[], None], page: int) -> None:
        try:
            put()
        except UserfaultError as error:
            if error.errno != errno.EEXIST:
                raise
            self.late += 1
            self.userfault.wake(page, HOST_PAGE)
