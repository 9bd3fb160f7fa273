# SPDX-License-Identifier: Apache-2.0
"""The thread that serves a userfaultfd, and its shutdown: shared by the page fault servers.

A ``FaultThread`` owns its thread and the eventfd that ends it. Any thread may make and stop one.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from typing import Self

from pyvmm.errors import HostError
from pyvmm.memory.userfault import Userfault


class FaultThread(ABC):
    """Serves one ``Userfault``. Stop it, or use it as a context manager.

    Unanswered faults wait for the next server. Leaving the context raises ``error``. If another exception leaves it,
    ``error`` becomes the cause at the end of that one's chain. A subclass calls :meth:`_start` once it is complete.
    """

    def __init__(self, userfault: Userfault) -> None:
        self.userfault = userfault
        self.error: BaseException | None = None
        """The first error that left a fault unanswered."""
        self._stopping = False
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="pyvmm-userfault", daemon=True)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            userfault.attach(self.stop)
        except BaseException:
            os.close(self._wake)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, raised: BaseException | None, _traceback: object) -> None:
        self.stop()
        if self.error is None:
            return
        if raised is None:
            raise self.error
        # A fault without an answer makes the guest wait, so what is raised there names only the silence.
        first = raised
        while before := first.__cause__ or (None if first.__suppress_context__ else first.__context__):
            first = before
        if first is not self.error:
            first.__cause__ = self.error

    @property
    def alive(self) -> bool:
        """Whether it still answers faults."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Stop answering. Returns when the current fault is done. Idempotent.

        Called in the server's own thread it returns at once, and the thread ends before it waits again.
        """
        self._stopping = True
        if threading.current_thread() is self._thread:
            return
        with self._ending:
            if self._wake < 0:
                return
            os.eventfd_write(self._wake, 1)
            self._thread.join()
            self._ended()

    def _start(self) -> None:
        """Start to serve. Raises HostError if the host has no thread; faults are then not served."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._ended()
            raise HostError(f"cannot start a thread for page faults: {error}", hint="see ulimit -u") from error

    def _ended(self) -> None:
        """Release the thread's resources, after its end."""
        wake, self._wake = self._wake, -1
        os.close(wake)
        self.userfault.attach(None)

    @abstractmethod
    def _main(self) -> None:
        """Answer faults until ``_wake`` is readable."""
