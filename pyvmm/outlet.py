# SPDX-License-Identifier: Apache-2.0
"""Where consoles' output and events go: somebody else's descriptor, written to without ever waiting for its reader.

Who writes holds locks that others need, so a write takes what there is room for, and returns. Having seen POLLOUT is
not enough for that: of a terminal it says that there is some room, and a blocking write waits for all of it; of a pipe
that there is room for PIPE_BUF bytes, until somebody else writes there too. And O_NONBLOCK is not ours to set on what
is the user's shell's as well. An :class:`Outlet` owns a description of its own where it needs one.

==============================  ====================================================
terminal, pipe                  opened once more, by /proc/self/fd, not to block
one that cannot be: another's   a byte at a time, when POLLOUT promises room for one
socket                          sent to with MSG_DONTWAIT
anything else: files, devices   written to; there is no reader to wait for
==============================  ====================================================
"""

from __future__ import annotations

import contextlib
import os
import select
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

_PTMX: Final = os.makedev(5, 2)
"""The master's end of any pseudo-terminal: to open that once more makes another terminal."""


class Outlet:
    """Writes to ``fd``, which stays open; close it all the same. Its users see to it that one writes at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._close: Callable[[], None] = lambda: None
        self._write: Callable[[bytes | memoryview], int] = lambda data: os.write(fd, data)
        with contextlib.suppress(OSError):  # no descriptor at all: writing to it tells why
            about = os.fstat(fd)
            if stat.S_ISSOCK(about.st_mode):
                self._send()
            elif stat.S_ISFIFO(about.st_mode) or os.isatty(fd):
                self._reopen(may=about.st_rdev != _PTMX)

    def _send(self) -> None:
        import socket  # which few consoles are

        with contextlib.suppress(OSError):
            end = socket.socket(fileno=os.dup(self._fd))
            self._write, self._close = lambda data: end.send(data, socket.MSG_DONTWAIT), end.close

    def _reopen(self, *, may: bool) -> None:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        self._write = self._write_one
        with contextlib.suppress(OSError):
            if may:
                own = os.open(f"/proc/self/fd/{self._fd}", flags)
                self._fd, self._write, self._close = own, lambda data: os.write(own, data), lambda: os.close(own)

    def _write_one(self, data: bytes | memoryview) -> int:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return os.write(self._fd, data[:1]) if poll.poll(0) else 0

    def fileno(self) -> int:
        """Return what to wait on for POLLOUT."""
        return self._fd

    def write(self, data: bytes | memoryview) -> int:
        """Write what there is room for now, and return how many bytes that were; OSError where it cannot be written.

        After 0 wait for POLLOUT, and not only for that: where others write too, it may not be true for long.
        """
        try:
            return self._write(data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close what is its own; idempotent. Write no more."""
        close, self._close = self._close, lambda: None
        close()
