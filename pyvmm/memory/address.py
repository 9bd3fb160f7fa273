# SPDX-License-Identifier: Apache-2.0
"""Two address types, guest and host, and arithmetic in pages of the host. Owns nothing. Every module may import it."""

from __future__ import annotations

from pyvmm.errors import hex_
from pyvmm.pages import HOST_PAGE
from pyvmm.typed import NewType

Gpa = NewType("Gpa", int)
"""A guest physical address (the arm64 manuals' IPA), in bytes."""

Hva = NewType("Hva", int)
"""An address in this process, in bytes. Never dereferenced from Python."""

MIB = 1 << 20


def is_aligned(value: int, granule: int = HOST_PAGE) -> bool:
    """Whether ``value`` is a multiple of ``granule`` (a power of two)."""
    return value & (granule - 1) == 0


def align_down(value: int, granule: int = HOST_PAGE) -> int:
    """Round down to a multiple of ``granule`` (a power of two)."""
    return value & -granule


def align_up(value: int, granule: int = HOST_PAGE) -> int:
    """Round up to a multiple of ``granule`` (a power of two)."""
    return (value + granule - 1) & -granule


def pages(start: int, size: int) -> range:
    """Return the address of every page that ``[start, start + size)`` touches, in order."""
    if size <= 0:
        return range(0)
    return range(align_down(start), align_up(start + size), HOST_PAGE)


def span(start: int, size: int) -> str:
    """Write a half-open range for a message: ``[0x8000_0000, 0x9000_0000)``."""
    return f"[{hex_(start)}, {hex_(start + size)})"
