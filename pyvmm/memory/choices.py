# SPDX-License-Identifier: Apache-2.0
"""What a user may choose of guest memory. A leaf: the command line lists the names before anything else is loaded."""

from __future__ import annotations

from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

BACKINGS: Final = ("memfd", "anonymous", "thp", "hugetlb", "guest_memfd", "private")
DEFAULT_MEMORY: Final = 64 << 20
"""Bytes of memory that a guest has unless it is said, but for those with a named kernel."""


class ConversionPolicy(Enum):
    """What becomes of a page's contents when it changes hands; the value is what a user types."""

    PRESERVE = "preserve"
    """The host's view opens or closes, the contents stay: what pKVM does. Cost: one mprotect."""
    ZERO = "zero"
    """The VMM zeroes the page in between, in both directions. Cost: an mprotect and 4 KiB of stores."""
    PUNCH = "punch"
    """The page is dropped from its file, the other side gets a new one. Cost: an mprotect, a punch, a stage-2 fault."""
    COPY = "copy"
    """Shared pages live in a file of their own, slots move around them. Cost: a copy and two to six slot changes."""


CONVERSIONS: Final = tuple(policy.value for policy in ConversionPolicy)
"""Their names, as a user types them."""
