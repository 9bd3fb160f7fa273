# SPDX-License-Identifier: Apache-2.0
"""Surroundings for drivers of devices under test, without KVM: guest memory, an interrupt, a transport that records."""

from __future__ import annotations

import os
from typing import NamedTuple

from pyvmm._native import ffi, lib
from pyvmm.memory import mman
from pyvmm.uapi.mman import PROT_NONE

PAGE = 4096
BASE = 0x8000_0000
SIZE = 4 << 20
NEXT, WRITE = 1, 2
"""Flags of a descriptor."""


class Segment(NamedTuple):
    gpa: int
    size: int
    writable: bool = False


class Transport:
    """Records the calls of a device to its transport."""

    def __init__(self) -> None:
        self.reset_needed = False
        self.changes = 0

    def needs_reset(self) -> None:
        self.reset_needed = True

    def config_changed(self) -> None:
        self.changes += 1


class PlainGuest:
    """``SIZE`` bytes of memory at ``BASE``. ``vm`` and ``line`` are the native loop's structures for them."""

    def __init__(self) -> None:
        lib.pv_install_signals()
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, SIZE)
        self.hva = mman.map_shared(self.fd, SIZE)
        ledger = ffi.new("uint8_t[]", SIZE // PAGE)
        regions = ffi.new("struct pv_region[]", 1)
        regions[0].gpa, regions[0].size, regions[0].ledger = BASE, SIZE, ledger
        regions[0].view = ffi.cast("uint8_t *", self.hva)
        map_ = ffi.new("struct pv_map *", {"count": 1, "regions": regions})
        self._keep = [ledger, regions, map_]
        self.vm = ffi.new("struct pv_vm *", {"map": map_})
        self.interrupts = os.eventfd(0, os.EFD_CLOEXEC)
        self.line = ffi.new("struct pv_interrupt *", {"fd": self.interrupts})
        self.transport = Transport()

    def close(self) -> None:
        os.close(self.interrupts)
        mman.unmap(self.hva, SIZE)
        os.close(self.fd)

    def write(self, gpa: int, data: bytes) -> None:
        """Store into guest memory, as the guest may: whatever the host may touch."""
        os.pwrite(self.fd, data, gpa - BASE)

    def read(self, gpa: int, size: int) -> bytes:
        return os.pread(self.fd, size, gpa - BASE)

    def hide(self, gpa: int, size: int = PAGE, *, hidden: bool = True) -> None:
        """Take pages from the host, or give them back."""
        mman.protect(self.hva + gpa - BASE, size, PROT_NONE if hidden else mman.PROT_RW)
