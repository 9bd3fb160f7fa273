# SPDX-License-Identifier: Apache-2.0
"""The lives of a guest that resets: how long the next one waits, and when there is to be none."""

from __future__ import annotations

import time

from pyvmm.vcpu.outcome import Ending, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

SHORT: Final = 10.0
"""Seconds: a guest that resets sooner may do nothing else, and waits longer each time."""
FIRST_PAUSE: Final = 0.1
MOST_PAUSE: Final = 10.0
LOOK: Final = 0.05
"""Seconds between two looks at whether the run is to end."""


class Lives:
    """Counts the lives of one run. ``deadline`` is seconds from the start of the first, None for none.

    ``asked`` says whether the run is to end for another reason.
    """

    def __init__(self, deadline: float | None, asked: Callable[[], object]) -> None:
        self._deadline, self._asked = deadline, asked
        self._first_ns = 0
        self._count = 0
        self._pause = FIRST_PAUSE

    @property
    def spent(self) -> float:
        """Seconds since the first life started; 0 before its end."""
        return (time.monotonic_ns() - self._first_ns) / 1e9 if self._first_ns else 0.0

    def reset(self, started_ns: int, lived_ns: int) -> Outcome | None:
        """Return how the run ends after a life that ended in a reset, or None where the guest is to start again.

        ``started_ns`` is when the life started, of CLOCK_MONOTONIC. Where there is no other, waits for the deadline.
        """
        self._first_ns = self._first_ns or started_ns
        self._count += 1
        self._pause = min(self._pause * 2, MOST_PAUSE) if lived_ns < SHORT * 1e9 and self._count > 1 else FIRST_PAUSE
        if self._deadline is None or (left := self._deadline - self.spent) > self._pause:
            return None
        if not self._wait(left):
            return None
        times = "once" if self._count == 1 else f"{self._count} times"
        return Outcome(Ending.DEADLINE, f"the guest reset {times} until its deadline of {self._deadline:g} s")

    def stand_by(self) -> None:
        """Wait as long as a guest that resets so often has to; no longer than until the run is to end."""
        self._wait(self._pause)

    def _wait(self, seconds: float) -> bool:
        """Whether nothing came meanwhile that ends the run."""
        end = time.monotonic() + seconds
        while not self._asked() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK))
        return not self._asked()
