# SPDX-License-Identifier: Apache-2.0
"""How a signal ends the program: as an exception that unwinds everything, so that nothing is left half done."""

from __future__ import annotations

import contextlib
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ends the program: everything unwinds, and the status is 128 + ``signal``."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


@contextlib.contextmanager
def handling(
    handler: Callable[[int, FrameType | None], object], numbers: Iterable[signal.Signals] = ENDING
) -> Iterator[None]:
    """Have ``handler`` called for these signals, also where who started us blocked them. In the main thread only.

    What was ignored at the start stays ignored: so nohup, and a shell's background job, want it.
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
            # None is a handler that is not Python's, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def terminable(handle: Callable[[int], object] | None = None, *, once: bool = False) -> Iterator[list[int]]:
    """Make SIGINT, SIGTERM and SIGHUP unwind, so that nothing is left half done; yields those that came, as they come.
    One that is ignored stays so.

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

    with handling(caught):
        yield received
