# SPDX-License-Identifier: Apache-2.0
"""A thread that serves the missing pages of a userfaultfd from one buffer, without Python on the way.

What :class:`pyvmm.memory.fault_server.Server` is for any answer, this is for the commonest: every page is there
already, and only has to be copied in at its first touch. A ``SourceServer`` owns its hold on the buffer.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm._native import ffi, lib
from pyvmm.errors import UsageError, hex_
from pyvmm.memory.address import is_aligned
from pyvmm.memory.fault_thread import FaultThread
from pyvmm.memory.userfault import Userfault, UserfaultError


class SourceServer(FaultThread):
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
        super().__init__(userfault)
        self._failed = failed
        self._native = ffi.new("struct pv_fault_server *")
        self._native.fd, self._native.stop_fd = userfault.fd, self._wake
        self._native.hva, self._native.size, self._native.source = hva, len(source), self._source
        self._start()

    @property
    def served(self) -> int:
        """Faults answered until now."""
        return int(self._native.served)

    def _ended(self) -> None:
        super()._ended()
        # A memoryview that is garbage while something holds its buffer is one that CPython crashes on.
        ffi.release(self._source)

    def _main(self) -> None:
        code = -lib.pv_serve_faults(self._native)
        if code:
            self.error = error = UserfaultError("UFFDIO_COPY", f"after {self.served} faults served", code)
            self._failed(error)
