# SPDX-License-Identifier: Apache-2.0
"""End the program on a signal by an exception, which unwinds everything in order.

A signal may come while Python runs a finalizer or a callback of a weak reference. No exception leaves those: Python
only prints it. Then the exception is raised again a moment later, or the program would go on as if there had been no
signal.
"""

from __future__ import annotations

import contextlib
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from types import FrameType
    from typing import Final


AGAIN: Final = 0.01
"""Seconds from a lost exception until it is raised again: by then the main thread does something else."""
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

    Signals that were ignored at the start stay ignored, for nohup and background jobs of a shell. What ``handler``
    raises is raised in the main thread, wherever that is.
    """
    raised: list[BaseException] = []
    lost: list[BaseException] = []

    def caught(number: int, frame: FrameType | None) -> None:
        if lost:
            raised.append(lost.pop())
            raise raised[-1]
        try:
            handler(number, frame)
        except BaseException as error:
            raised.append(error)
            raise

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        if what.exc_value not in raised:
            hook(what)
        elif not lost:
            lost.append(what.exc_value)
            _signal_again(mine[0], lost)

    mine = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(mine)
    old = {number: signal.signal(number, caught) for number in mine}
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, mine)
        yield
    finally:
        sys.unraisablehook = hook
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        for number, before in old.items():
            # None is a handler outside of Python, which cannot be restored.
            signal.signal(number, signal.SIG_DFL if before is None else before)
        raised.clear()  # their tracebacks hold this frame


def _signal_again(number: int, lost: Collection[BaseException]) -> None:
    """Send a signal to the main thread, unless nothing is ``lost`` any more. It ends what the thread then waits for."""
    import threading  # the exception

    def send() -> None:
        if lost:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    later = threading.Timer(AGAIN, send)
    later.daemon = True
    later.start()


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
