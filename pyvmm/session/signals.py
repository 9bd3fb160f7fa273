# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run.

Owns the handlers of SIGINT, SIGTERM and SIGHUP during a run. Used by ``run``, from the main thread.
"""

from __future__ import annotations

import signal
import threading

from pyvmm.interrupt import Interrupted, handling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self


class Signals:
    """SIGINT, SIGTERM and SIGHUP end the run cleanly, but for those that are ignored; a context manager.

    The first signal calls ``stop`` with the reason; set ``stop`` once the run can be stopped. A second signal, or one
    without ``stop``, raises :class:`Interrupted` in the main thread. It does so once, so that cleanup is not
    interrupted. ``asked`` is the reason, from a signal or from :meth:`end`, and ``received`` the first signal's number;
    None for none.
    """

    def __init__(self) -> None:
        self.stop: Callable[[str], None] | None = None
        self.received: int | None = None
        self.asked: str | None = None
        self._raised = False

    def __enter__(self) -> Self:
        self._handling = handling(self._caught)
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def _caught(self, number: int, _frame: object) -> None:
        again, self.received = self.received is not None, self.received or number
        if self._raised:
            return
        if again or self.stop is None:
            self._raised = True
            raise Interrupted(self.received)
        try:
            self.end(signal.Signals(number).name)
        except RuntimeError:  # no thread to stop it from
            self._raised = True
            raise Interrupted(self.received) from None

    def end(self, reason: str) -> None:
        """Stop the run, from any thread or a signal handler. Without ``stop``, only ``asked`` is set."""
        self.asked = self.asked or reason
        # A separate thread: a signal handler interrupts the main thread anywhere, and must not take its locks.
        if self.stop is not None:
            threading.Thread(target=self.stop, args=(reason,), name="pyvmm-stop", daemon=True).start()
