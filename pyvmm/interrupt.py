# SPDX-License-Identifier: Apache-2.0
"""How a signal ends the program: as an exception that unwinds everything, so that nothing is left half done."""

from __future__ import annotations

import contextlib
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal ends the program: everything unwinds, and the status is 128 + ``signal``."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextlib.contextmanager
def terminable(handle: Callable[[int], object] | None = None, *, once: bool = False) -> Iterator[list[int]]:
    """Make SIGINT, SIGTERM and SIGHUP unwind, so that nothing is left half done; yields those that came, as they come.

    Each raises :class:`Interrupted`, with ``once`` the first only, so that no other cuts the way out short; with
    ``handle``, that is called with the signal's number instead. In the main thread only; may be nested.
    """
    received: list[int] = []

    def caught(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if handle is not None:
            handle(number)
        elif not once or len(received) == 1:
            raise Interrupted(number)

    old = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
