# SPDX-License-Identifier: Apache-2.0
"""The user's choices for guest memory. Imports nothing heavy: the command line lists the names first."""

from __future__ import annotations

from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

BACKINGS: Final = ("memfd", "anonymous", "thp", "hugetlb", "guest_memfd", "private")
"""What guest memory can be made of, by the user's words."""
DEFAULT_MEMORY: Final = 64 << 20
"""Default memory of a guest, in bytes, except with a named kernel."""


class ConversionPolicy(Enum):
    """The effect of a conversion on a page's contents. The value is the user's word for it."""

    PRESERVE = "preserve"
    """The contents stay, as under pKVM. Only the host's access changes. Cost: one mprotect."""
    ZERO = "zero"
    """The VMM zeroes the page, in both directions. Cost: an mprotect and a page of stores."""
    PUNCH = "punch"
    """The page is dropped from its file and replaced by a new one. Cost: an mprotect, a punch, a stage-2 fault."""
    COPY = "copy"
    """Shared pages move to another file, and slots are split around them. Cost: a copy and two to six slot changes."""


CONVERSIONS: Final = tuple(policy.value for policy in ConversionPolicy)
"""The names of the policies for the user."""
