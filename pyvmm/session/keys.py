# SPDX-License-Identifier: Apache-2.0
"""Send keys from a terminal to the guest.

Owns the terminal's mode, which it always restores, and one thread (``pyvmm-keys``). Used by ``run``, from the main
thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import termios
import threading

from pyvmm.terminal import in_background

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

ESCAPE = 0x01
"""Ctrl-A: the next key is for us. ``x`` quits, ``b`` is a BREAK, a second Ctrl-A goes to the guest.

Other keys go with the escape, and so does ``b`` where the console has no BREAK.
"""


class Keys:
    """A terminal whose keys go to the guest one by one. A context manager.

    The guest's console reads from ``fd``. The thread calls ``quit`` at Ctrl-A x. When the pipe to the guest is full,
    further keys are dropped, so that Ctrl-A x always works. ``send_break`` is called at Ctrl-A b. A virtio console has
    no BREAK. ``held`` waits for :meth:`start`.
    """

    def __init__(
        self,
        terminal: int,
        quit: Callable[[], None],
        send_break: Callable[[], None] | None = None,
        *,
        held: bool = False,
    ) -> None:
        self._terminal = terminal
        self._quit = quit
        self._break = send_break
        self._escaped = False
        self._held = held

    def __enter__(self) -> Self:
        self._saved = termios.tcgetattr(self._terminal)
        self.fd, self._keys = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._keys, False)
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._move, name="pyvmm-keys", daemon=True)
        if not self._held:
            self.start()
        return self

    def start(self) -> None:
        """Take the terminal's keys from now on."""
        termios.tcsetattr(self._terminal, termios.TCSANOW, raw(self._saved))
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread.ident is not None:
            os.write(self._stop_write, b"x")
            self._thread.join()
        # If the terminal is gone, or belongs to another job by now, there is no mode to restore.
        with contextlib.suppress(termios.error):
            if not in_background(self._terminal):
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
            self._pass_on(keys)

    def _pass_on(self, keys: bytes) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._keys, keys)

    def take(self, typed: bytes) -> bytes | None:
        """Return the part of ``typed`` for the guest that is not passed on yet, or None for Ctrl-A x."""
        keys = bytearray()
        for key in typed:
            if self._escaped:
                self._escaped = False
                if key in b"xX":
                    return None
                if key in b"bB" and self._break is not None:
                    self._pass_on(bytes(keys))
                    keys.clear()
                    self._break()
                    continue
                keys += bytes([ESCAPE]) if key == ESCAPE else bytes([ESCAPE, key])
            elif key == ESCAPE:
                self._escaped = True
            else:
                keys.append(key)
        return bytes(keys)


def raw(mode: list[Any]) -> list[Any]:
    """Return a terminal mode that delivers every key at once, with unchanged output."""
    iflag, oflag, cflag, lflag, *rest = mode
    iflag &= ~(termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP | termios.IXON)
    lflag &= ~(termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
    return [iflag, oflag, cflag, lflag, *rest]
