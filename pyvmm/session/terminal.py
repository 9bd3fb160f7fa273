# SPDX-License-Identifier: Apache-2.0
"""The user's side of a run: keys from a terminal to the guest, and signals that end the run.

Owns the terminal's mode, which is put back however the run ends, one thread (``pyvmm-keys``), and the handlers of
SIGINT, SIGTERM and SIGHUP while a run lasts. Used by ``run``, from the main thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import threading

from pyvmm.interrupt import Interrupted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

ESCAPE = 0x01
"""Ctrl-A: the next key is for us. ``x`` quits, another Ctrl-A goes to the guest, anything else goes with its escape."""


class Keys:
    """A terminal whose keys go to the guest one by one; a context manager.

    ``fd`` is what the guest's console reads. ``quit`` is called, in the thread, at Ctrl-A x. Keys the guest does not
    take in time (a pipe's worth) are dropped, so that Ctrl-A x always works.
    """

    def __init__(self, terminal: int, quit: Callable[[], None]) -> None:
        self._terminal = terminal
        self._quit = quit
        self._escaped = False

    def __enter__(self) -> Self:
        self._saved = termios.tcgetattr(self._terminal)
        self.fd, self._keys = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._keys, False)
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._move, name="pyvmm-keys", daemon=True)
        termios.tcsetattr(self._terminal, termios.TCSANOW, raw(self._saved))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join()
        with contextlib.suppress(termios.error):
            # The terminal may have gone away; then there is no mode to put back.
            termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._saved)
        for fd in (self.fd, self._keys, self._stop_read, self._stop_write):
            os.close(fd)

    def _move(self) -> None:
        poll = select.poll()
        poll.register(self._terminal, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        while self._stop_read not in dict(poll.poll()):
            try:
                typed = os.read(self._terminal, 1024)
            except OSError:
                return
            if not typed:
                return
            if (keys := self.take(typed)) is None:
                self._quit()
                return
            with contextlib.suppress(BlockingIOError):
                os.write(self._keys, keys)

    def take(self, typed: bytes) -> bytes | None:
        """Return what of ``typed`` is for the guest, or None when it asks to quit."""
        keys = bytearray()
        for key in typed:
            if self._escaped:
                self._escaped = False
                if key in b"xX":
                    return None
                keys += bytes([ESCAPE]) if key == ESCAPE else bytes([ESCAPE, key])
            elif key == ESCAPE:
                self._escaped = True
            else:
                keys.append(key)
        return bytes(keys)


def raw(mode: list[Any]) -> list[Any]:
    """Return a terminal mode that hands over every key at once; output is left as it is."""
    iflag, oflag, cflag, lflag, *rest = mode
    iflag &= ~(termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP | termios.IXON)
    lflag &= ~(termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
    return [iflag, oflag, cflag, lflag, *rest]


def in_foreground(terminal: int) -> bool:
    """Whether this process may read and set ``terminal`` without being stopped for it."""
    try:
        return os.isatty(terminal) and os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False


class Signals:
    """SIGINT, SIGTERM and SIGHUP end the run cleanly; a context manager.

    The first one calls ``stop`` (set it once there is something to stop) with the reason; a second one, or one with
    nothing to stop, raises :class:`Interrupted` in the main thread, once: what unwinds then is not cut short. ``asked``
    is why the run was to end, by a signal or by :meth:`end`, and ``received`` the first signal's number; None for none.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.stop: Callable[[str], None] | None = None
        self.received: int | None = None
        self.asked: str | None = None
        self._raised = False

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, self._caught) for number in self.CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _caught(self, number: int, _frame: object) -> None:
        again, self.received = self.received is not None, self.received or number
        if self._raised:
            return
        if again or self.stop is None:
            self._raised = True
            raise Interrupted(self.received)
        self.end(signal.Signals(number).name)

    def end(self, reason: str) -> None:
        """Stop what there is to stop, from any thread or a signal handler; where nothing is, ``asked`` remains."""
        self.asked = self.asked or reason
        # A thread of its own: a handler runs between any two lines of the main thread, whose locks it must not take.
        if self.stop is not None:
            threading.Thread(target=self.stop, args=(reason,), name="pyvmm-stop", daemon=True).start()
