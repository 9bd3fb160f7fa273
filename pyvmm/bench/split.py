# SPDX-License-Identifier: Apache-2.0
"""Where the time of a cold donation goes: four parts, each measured separately. Pure functions.

The whole is what the guest waits for a page that nobody has touched, by its own counter, less what tracing takes:

exit and entry
    An exit that does nothing, less its time at EL2: the guest's, and the host's way from the exit to the next entry.
account and pin
    The donation of a page that is there already, less its time at EL2 and an exit and entry: finding the slot, the
    account of locked memory, pinning, the host's book of what was donated.
allocation and zeroing
    Populating pages from the host, less doing so again, less the time at EL2 in both.
EL2
    The hypervisor's time in the donation itself: the world switches, the page's change of owner, and the host's own
    first touch of a page that it gets to zero, which is an abort to EL2.

Nothing is counted twice, and nothing is what remains: that the parts add up is a finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyvmm.bench.el2 import Cost

WHOLE: Final = "whole"
PARTS: Final = ("EL2", "account and pin", "allocation and zeroing", "exit and entry")


@dataclass(frozen=True, slots=True)
class Measured:
    """What the parts are made of, each per page or exit: see the module's docstring."""

    cold: Cost
    """The first touch of a page that is not there."""
    populated: Cost
    """The first touch of a page that is."""
    exit: Cost
    """An exit that does nothing."""
    populating: Cost
    """The host's populating of a page."""
    again: Cost
    """The same of a page that is there."""

    def split(self) -> dict[str, float]:
        """Return the whole and its parts, in ns."""
        exit_and_entry = self.exit.rest
        return {
            WHOLE: self.cold.whole,
            "EL2": self.cold.hypervisor,
            "account and pin": self.populated.rest - exit_and_entry,
            "allocation and zeroing": self.populating.rest - self.again.rest,
            "exit and entry": exit_and_entry,
        }
