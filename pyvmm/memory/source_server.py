# SPDX-License-Identifier: Apache-2.0
"""Serve the missing pages of a userfaultfd from one buffer, in a native thread without Python.

:class:`pyvmm.memory.fault_server.Server` gives any answer. This one covers the most common case: all pages exist, and
are copied at their first access. A ``SourceServer`` owns a reference to the buffer.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm._native import ffi, lib
from pyvmm.errors import UsageError, hex_
from pyvmm.memory.address import is_aligned
from pyvmm.memory.fault_thread import FaultThread
from pyvmm.memory.userfault import Userfault, UserfaultError


class SourceServer(FaultThread):
    """Serves ``[hva, hva + len(source))``, whole pages, registered for missing. Stop it, or use it as a context.

    Unanswered faults wait for the next server. If the kernel refuses an answer, the faulting thread keeps waiting, and
    the server's thread calls ``failed`` at once. Leaving the context then raises UserfaultError.
    """

    def __init__(
        self,
        userfault: Userfault,
        hva: int,
        source: bytes | bytearray | memoryview,
        failed: Callable[[UserfaultError], object] = lambda _: None,
    ) -> None:
        if not (is_aligned(hva) and is_aligned(len(source)) and len(source)):
            raise UsageError(f"serving {len(source)} bytes at {hex_(hva)}: use whole pages")
        self._source = ffi.from_buffer("uint8_t[]", source)
        super().__init__(userfault)
        self._failed = failed
        self._native = ffi.new("struct pv_fault_server *")
        self._native.fd, self._native.stop_fd = userfault.fd, self._wake
        self._native.hva, self._native.size, self._native.source = hva, len(source), self._source
        self._start()

    @property
    def served(self) -> int:
        """Faults answered so far."""
        return int(self._native.served)

    def _ended(self) -> None:
        super()._ended()
        # Release the buffer first: CPython crashes on a collected memoryview with an exported buffer.
        ffi.release(self._source)

    def _main(self) -> None:
        code = -lib.pv_serve_faults(self._native)
        if code:
            self.error = error = UserfaultError("UFFDIO_COPY", f"after {self.served} faults served", code)
            self._failed(error)
