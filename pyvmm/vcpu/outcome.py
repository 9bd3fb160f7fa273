# SPDX-License-Identifier: Apache-2.0
"""How a run ended, in the words the user reads and the exit status the shell gets."""

from __future__ import annotations

from enum import Enum

from pyvmm.typed import NamedTuple


class Ending(Enum):
    """The ways a run ends."""

    POWEROFF = "powered off"
    FAILED = "failed"
    UNWELL = "reported a failure"
    CRASH = "crashed"
    RESET = "reset"
    DEADLINE = "deadline"
    INTERRUPTED = "interrupted"
    UNABLE = "not possible on this host"

    @property
    def status(self) -> int:
        """Exit status of the process."""
        return _STATUS[self]


_STATUS = {
    Ending.POWEROFF: 0,
    Ending.FAILED: 1,
    Ending.UNWELL: 3,
    Ending.CRASH: 3,
    Ending.RESET: 3,
    Ending.DEADLINE: 4,
    Ending.INTERRUPTED: 130,
    Ending.UNABLE: 5,
}


class Outcome(NamedTuple):
    """Why the machine stopped. ``vcpu`` is the number of the vCPU that caused it, or None."""

    ending: Ending
    reason: str
    vcpu: int | None = None
    hint: str | None = None

    @property
    def status(self) -> int:
        """Exit status of the process."""
        return self.ending.status
