# SPDX-License-Identifier: Apache-2.0
"""Load a slot's memory page by page from a file, when the guest accesses it.

A :class:`LazySlot` owns a mapping of the file, a userfaultfd and the thread that serves it. Close it while the slot's
memory is still mapped and no vCPU runs. The file must not change meanwhile.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pyvmm._native import ffi
from pyvmm.errors import PyvmmError, hex_
from pyvmm.kvm import libc
from pyvmm.log import get_logger
from pyvmm.memory import mman
from pyvmm.memory.mman import MappingError
from pyvmm.memory.source_server import SourceServer
from pyvmm.memory.userfault import Userfault
from pyvmm.uapi.mman import MAP_SHARED, PROT_NONE, PROT_READ

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.memory.slots import Slot

log = get_logger("snapshot")


class LazySlot:
    """Fills ``slot`` from the file ``fd``, from byte ``offset``.

    Its thread calls ``failed`` if a page cannot be read. Raises HostError if this process may not use userfaultfd,
    MappingError if the file cannot be mapped.
    """

    def __init__(self, fd: int, offset: int, slot: Slot, failed: Callable[[PyvmmError], None]) -> None:
        self._slot = slot
        self._tell = failed
        with contextlib.ExitStack() as half:
            self._userfault = half.enter_context(Userfault.open())
            self._userfault.register(slot.hva, slot.size, missing=True)
            self._address, code = libc.mmap(slot.size, PROT_READ, MAP_SHARED, fd, offset)
            if code:
                raise MappingError("mmap", f"size={slot.size:#x}, offset={offset:#x}", code)
            half.callback(libc.munmap, self._address, slot.size)
            source = memoryview(ffi.buffer(ffi.cast("uint8_t *", self._address), slot.size))
            self._server = SourceServer(self._userfault, slot.hva, source, self._failed)
            log.info("restored_lazily", gpa=hex_(slot.gpa), size=slot.size)
            half.pop_all()

    def _failed(self, error: PyvmmError) -> None:
        self._tell(
            PyvmmError(
                f"a page of the snapshot cannot be read: {error.message}",
                hint="was the file changed or truncated while the guest ran?",
            )
        )
        # A waiting access must not read zeros, which it might write to a disk. So no access succeeds from now on.
        mman.protect(self._slot.hva, self._slot.size, PROT_NONE)
        self._userfault.close()

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._userfault.close()
        address, self._address = self._address, 0
        if address:
            libc.munmap(address, self._slot.size)
