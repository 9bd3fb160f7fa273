# SPDX-License-Identifier: Apache-2.0
"""End the program on a signal by an exception, which unwinds everything in order."""

from __future__ import annotations

import contextlib
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Raised when a signal ends the program. The exit status is 128 + ``signal``."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextlib.contextmanager
def handling(
    handler: Callable[[int, FrameType | None], object], numbers: Iterable[signal.Signals] = ENDING
) -> Iterator[None]:
    """Call ``handler`` for these signals, even if the parent process blocked them. Main thread only.

    Signals that were ignored at the start stay ignored, for nohup and background jobs of a shell.
    """
    mine = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(mine)
    old = {number: signal.signal(number, handler) for number in mine}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, mine)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        for number, before in old.items():
            # None is a handler outside of Python, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def terminable(handle: Callable[[int], object] | None = None, *, once: bool = False) -> Iterator[list[int]]:
    """Make SIGINT, SIGTERM and SIGHUP raise Interrupted. Yields the list of received signals.

    Ignored signals stay ignored. Each signal raises :class:`Interrupted`. With ``once`` only the first does, so that
    cleanup is not interrupted. With ``handle``, that is called with the signal's number instead. Main thread only. May
    be nested.
    """
    received: list[int] = []

    def caught(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if handle is not None:
            handle(number)
        elif not once or len(received) == 1:
            raise Interrupted(number)

    with handling(caught):
        yield received
