# SPDX-License-Identifier: Apache-2.0
"""Serve the missing pages of a userfaultfd from one buffer or file, in a native thread without Python.

:class:`pyvmm.memory.fault_server.Server` gives any answer. These cover the most common case: all pages exist, and are
copied at their first access. A ``SourceServer`` owns a reference to its buffer. A ``FileServer`` does not own the file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from pyvmm._native import ffi, lib
from pyvmm.errors import PyvmmError, UsageError, hex_
from pyvmm.memory.address import is_aligned
from pyvmm.memory.fault_thread import FaultThread
from pyvmm.memory.userfault import Userfault, UserfaultError
from pyvmm.pages import HOST_PAGE

_NO_PAGE = (1 << 64) - 1


class PageError(PyvmmError):
    """A page of a file cannot be read. ``offset`` is that from the first page, ``errno`` the reason.

    The latter is EBADMSG for a page that does not match its checksum, and ENODATA if the file ends before it.
    """

    def __init__(self, offset: int, code: int) -> None:
        reason = {errno.EBADMSG: "does not match its checksum", errno.ENODATA: "is behind the end of the file"}
        super().__init__(f"the page at offset {hex_(offset)} {reason.get(code, f'has the error {os.strerror(code)}')}")
        self.offset, self.errno = offset, code


class _NativeServer(FaultThread):
    """Serves whole pages from ``hva`` on, registered for missing. Stop it, or use it as a context.

    Unanswered faults wait for the next server. If the kernel refuses an answer, the faulting thread keeps waiting, and
    the server's thread calls ``failed`` at once. Leaving the context then raises that error.
    """

    def __init__(self, userfault: Userfault, hva: int, size: int, failed: Callable[[PyvmmError], object]) -> None:
        if not (is_aligned(hva) and is_aligned(size) and size):
            raise UsageError(f"serving {size} bytes at {hex_(hva)}: use whole pages")
        super().__init__(userfault)
        self._failed = failed
        self._native = ffi.new("struct pv_fault_server *")
        self._native.fd, self._native.stop_fd = userfault.fd, self._wake
        self._native.hva, self._native.size, self._native.refused = hva, size, _NO_PAGE

    @property
    def served(self) -> int:
        """Faults answered so far."""
        return int(self._native.served)

    def _main(self) -> None:
        code = -lib.pv_serve_faults(self._native)
        if code:
            self.error = error = self._reason(code)
            self._failed(error)

    def _reason(self, code: int) -> PyvmmError:
        if self._native.refused != _NO_PAGE:
            return PageError(int(self._native.refused), code)
        return UserfaultError("UFFDIO_COPY", f"after {self.served} faults served", code)


class SourceServer(_NativeServer):
    """Serves ``[hva, hva + len(source))``, whole pages, registered for missing. Stop it, or use it as a context.

    Unanswered faults wait for the next server. If the kernel refuses an answer, the faulting thread keeps waiting, and
    the server's thread calls ``failed`` at once. Leaving the context then raises UserfaultError.
    """

    def __init__(
        self,
        userfault: Userfault,
        hva: int,
        source: bytes | bytearray | memoryview,
        failed: Callable[[PyvmmError], object] = lambda _: None,
    ) -> None:
        self._source = ffi.from_buffer("uint8_t[]", source)
        try:
            super().__init__(userfault, hva, len(self._source), failed)
        except BaseException:
            ffi.release(self._source)
            raise
        self._native.source = self._source
        self._start()

    def _ended(self) -> None:
        super()._ended()
        # Release the buffer first: CPython crashes on a collected memoryview with an exported buffer.
        ffi.release(self._source)


class FileServer(_NativeServer):
    """Serves ``[hva, hva + size)`` from the pages at byte ``at`` of ``file``, a descriptor that stays open meanwhile.

    Each 4096 bytes must match their checksum. The checksums are at byte ``sums`` of the file, as pv_checksums() writes
    them. ``failed`` gets, and leaving the context raises, a PageError for a page that cannot be read or does not match.
    """

    def __init__(
        self,
        userfault: Userfault,
        hva: int,
        size: int,
        file: int,
        at: int,
        sums: int,
        failed: Callable[[PyvmmError], object],
    ) -> None:
        super().__init__(userfault, hva, size, failed)
        self._native.file, self._native.at, self._native.sums = file, at, sums
        self._room = self._native.room = ffi.new("uint8_t[]", HOST_PAGE)
        self._start()
