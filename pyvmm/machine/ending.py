# SPDX-License-Identifier: Apache-2.0
"""Record how long a run lasted and how it ended. The first reason counts.

A :class:`RunEnd` owns nothing else. Any thread may call it. Its lock is held only to read and set fields.
"""

from __future__ import annotations

import contextlib
import threading
import time

from pyvmm.errors import LimitError, PyvmmError, exhausted
from pyvmm.log import get_logger
from pyvmm.vcpu.outcome import Ending, Outcome

log = get_logger("machine")


class RunEnd:
    """The end of one run, past or future. Times are CLOCK_MONOTONIC, 0 for events that have not happened."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.started_ns = self.ended_ns = 0
        self._changed = threading.Condition()
        self._said = False

    @property
    def elapsed_ns(self) -> int:
        """Nanoseconds since the start, or of the whole run once it has ended; from 0."""
        if not self.started_ns:
            return 0
        return max((self.ended_ns or time.monotonic_ns()) - self.started_ns, 0)

    def begin(self) -> None:
        """Start to count the time."""
        self.started_ns = time.monotonic_ns()

    def finish(self, outcome: Outcome) -> Outcome:
        """End the run, unless it has ended, and return the reason of its end."""
        with self._changed:
            if self.outcome is None:
                self.outcome = outcome
                self.ended_ns = time.monotonic_ns()
                self._changed.notify_all()
            return self.outcome

    def failed(self, error: BaseException) -> None:
        """End the run because of ``error``."""
        # It ends before anything is said of it: what says it may fail of the same.
        told = exhausted(error) or error
        hint = told.hint if isinstance(told, PyvmmError) else None
        text = told.message if isinstance(told, PyvmmError) else f"{type(told).__name__}: {told}"
        ending = Ending.UNABLE if isinstance(told, LimitError) else Ending.FAILED
        self.finish(Outcome(ending, text, hint=hint))
        with contextlib.suppress(Exception):
            log.error("vcpu_thread_failed", error=text, exc_info=told if not isinstance(told, PyvmmError) else None)

    def unheard(self, error: OSError) -> None:
        """End the run because the guest's output cannot be written."""
        lost = Outcome(Ending.FAILED, f"the guest's output cannot be written: {error.strerror}")
        with self._changed:
            # The guest may end before the last of its output is written. That run failed as well.
            if self.outcome is not None and self.outcome.ending is Ending.POWEROFF:
                self.outcome = lost
        self.finish(lost)

    def wait(self, timeout: float | None) -> Outcome | None:
        """Wait for the end and return it, or None after ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.outcome is not None, timeout)
            return self.outcome

    def say(self, outcome: Outcome) -> None:
        """Log how the run ended, once."""
        with self._changed:
            said, self._said = self._said, True
        if not said:
            log.info("ended", ending=outcome.ending.value, reason=outcome.reason, vcpu=outcome.vcpu)
