# SPDX-License-Identifier: Apache-2.0
"""A thread that serves the missing pages of a userfaultfd from one buffer, without Python on the way.

What :class:`pyvmm.memory.fault_server.Server` is for any answer, this is for the commonest: every page is there
already, and only has to be copied in at its first touch. A ``SourceServer`` owns its thread, the eventfd that stops
it, and its hold on the buffer.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Self

from pyvmm._native import ffi, lib
from pyvmm.errors import UsageError, hex_
from pyvmm.memory.address import is_aligned
from pyvmm.memory.userfault import Userfault, UserfaultError


class SourceServer:
    """Serves ``[hva, hva + len(source))``, registered for missing pages; whole pages. Stop it, or use it as a context.

    What is not answered when it stops waits for the next server. Leaving the context raises UserfaultError where the
    kernel refused an answer: who waited then waits on. ``failed`` hears of that at once, in the server's thread.
    """

    def __init__(
        self,
        userfault: Userfault,
        hva: int,
        source: bytes | bytearray | memoryview,
        failed: Callable[[UserfaultError], object] = lambda _: None,
    ) -> None:
        if not (is_aligned(hva) and is_aligned(len(source)) and len(source)):
            raise UsageError(f"serving {len(source)} bytes at {hex_(hva)}: whole pages are needed")
        self._source = ffi.from_buffer("uint8_t[]", source)
        self._userfault = userfault
        self._failed = failed
        self._stop_fd = -1
        self._stopping = threading.Lock()
        userfault.attach(self.stop)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._native = ffi.new("struct pv_fault_server *")
        self._native.fd, self._native.stop_fd = userfault.fd, self._stop_fd
        self._native.hva, self._native.size, self._native.source = hva, len(source), self._source
        self._error = 0
        self._thread = threading.Thread(target=self._main, name="pyvmm-userfault", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop()
        if self._error and kind is None:
            raise self._why()

    @property
    def served(self) -> int:
        """Faults answered until now."""
        return int(self._native.served)

    def stop(self) -> None:
        """Answer no more faults; returns when the one at hand is done. Idempotent; any thread but the server's."""
        with self._stopping:
            if self._stop_fd < 0:
                return
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            stop_fd, self._stop_fd = self._stop_fd, -1
            os.close(stop_fd)
            self._userfault.attach(None)

    def _main(self) -> None:
        self._error = -lib.pv_serve_faults(self._native)
        if self._error:
            self._failed(self._why())

    def _why(self) -> UserfaultError:
        return UserfaultError("UFFDIO_COPY", f"after {self.served} faults served", self._error)
