# SPDX-License-Identifier: Apache-2.0
"""The page sizes of this host and of pyvmm's guests, in bytes. Everything that counts pages asks here.

The host's page is the unit of all that the host does with guest memory: memory slots, stage 2, donations, shares (what
MEMINFO answers), conversions, holes, userfaultfd and the ledger. The guest's page is a number of protocols and of
pyvmm's own payloads. A Linux guest chooses its own page size.
"""

from __future__ import annotations

import mmap

HOST_PAGE = mmap.PAGESIZE
"""The host kernel's page: 4, 16 or 64 KiB on arm64."""

LARGEST_PAGE = 1 << 16
"""A multiple of every host's page."""

HOST_PAGE_SHIFT = HOST_PAGE.bit_length() - 1

HUGE_PAGE_SHIFT = 2 * HOST_PAGE_SHIFT - 3
HUGE_SIZE = 1 << HUGE_PAGE_SHIFT
"""A huge page of the host, which one full table of its pages maps: 2 MiB for pages of 4 KiB, 32 MiB, or 512 MiB."""

IMAGE_PAGES = (0, 4096, 16384, 65536)
"""A kernel's page by bits 1 and 2 of an arm64 Image's flags; 0 if it does not say (Linux before 3.17)."""

GUEST_PAGE = 4096
"""The page of payloads' translation tables, of device registers, and of the balloon's numbers (virtio 1.2, 5.5.6)."""
