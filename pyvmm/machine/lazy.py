# SPDX-License-Identifier: Apache-2.0
"""Load a slot's memory page by page from a file, when the guest accesses it.

A :class:`LazySlot` owns a userfaultfd and the thread that serves it. Close it while the slot's memory is still mapped
and no vCPU runs. The file must stay open until then, and must not change.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from pyvmm.errors import PyvmmError, hex_
from pyvmm.log import get_logger
from pyvmm.memory import mman
from pyvmm.memory.source_server import FileServer, PageError
from pyvmm.memory.userfault import Userfault
from pyvmm.uapi.mman import PROT_NONE

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.memory.slots import Slot

log = get_logger("snapshot")


class LazySlot:
    """Fills ``slot`` from the file ``fd``, from byte ``offset``. Checksums of its pages are at byte ``checksums``.

    Its thread calls ``failed`` if a page cannot be read or does not match. Raises HostError if this process may not use
    userfaultfd.
    """

    def __init__(self, fd: int, offset: int, checksums: int, slot: Slot, failed: Callable[[PyvmmError], None]) -> None:
        self._slot = slot
        self._tell = failed
        with contextlib.ExitStack() as half:
            self._userfault = half.enter_context(Userfault.open())
            self._userfault.register(slot.hva, slot.size, missing=True)
            self._server = FileServer(self._userfault, slot.hva, slot.size, fd, offset, checksums, self._failed)
            log.info("restored_lazily", gpa=hex_(slot.gpa), size=slot.size)
            half.pop_all()

    def _failed(self, error: PyvmmError) -> None:
        why, hint = error.message, "was the file changed or truncated while the guest ran?"
        if isinstance(error, PageError):
            why = f"gpa {hex_(self._slot.gpa + error.offset)}: {why}"
            if error.errno == errno.EBADMSG:
                hint = "the file is damaged: pyvmm run --restore FILE --verify checks all of it before the start"
        self._tell(PyvmmError(f"a page of the snapshot cannot be read: {why}", hint=hint))
        # A waiting access must not read zeros, which it might write to a disk. So no access succeeds from now on.
        mman.protect(self._slot.hva, self._slot.size, PROT_NONE)
        self._userfault.close()

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._userfault.close()
