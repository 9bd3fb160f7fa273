# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that gives this host larger pages: ``PYVMM_TEST_PAGE=16384 pytest -p tests.faked_pages FILE…``.

pyvmm then takes pages of that size for the host's. The kernel keeps its own, and accepts every multiple. Load it before
any module of pyvmm.
"""

from __future__ import annotations

import mmap
import os
import sys

assert not any(name.split(".")[0] == "pyvmm" for name in sys.modules), "pyvmm has asked for the page size already"

PAGE = int(os.environ["PYVMM_TEST_PAGE"])
assert PAGE % mmap.PAGESIZE == 0
mmap.PAGESIZE = PAGE  # type: ignore[misc]

from pyvmm._native import lib  # noqa: E402

lib.pv_page_shift = PAGE.bit_length() - 1

from pyvmm.memory import mman  # noqa: E402

_mmap = mman._mmap


def _aligned(address: int, size: int, access: int, flags: int, fd: int, offset: int) -> int:
    """Map as a kernel with these pages does: the address that it chooses is a multiple of them."""
    if address:
        return _mmap(address, size, access, flags, fd, offset)
    start = _mmap(0, size + PAGE, access, flags, fd, offset)
    address = (start + PAGE - 1) & -PAGE
    if address > start:
        mman.unmap(start, address - start)
    mman.unmap(address + size, start + PAGE - address)
    return address


mman._mmap = _aligned
