# SPDX-License-Identifier: Apache-2.0
"""Write to a foreign descriptor (a console's output, or events) without waiting for its reader.

A writer may hold locks, so a write must not block. POLLOUT does not guarantee that. For a terminal it means some room,
but a blocking write waits until all bytes fit. For a pipe it means room for PIPE_BUF bytes, until another process
writes there. Setting O_NONBLOCK would also affect the user's shell, which shares the description. So an :class:`Outlet`
opens a separate description where it needs one.

==============================  ====================================================
terminal, pipe                  opened once more, by /proc/self/fd, not to block
one that cannot be reopened     a byte at a time, when POLLOUT promises room for one
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
"""The master of a pseudo-terminal: opening it again would make a new terminal."""


class Outlet:
    """Writes to ``fd``, which it does not close. Close the Outlet itself. Only one thread may write at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._close: Callable[[], None] = lambda: None
        self._write: Callable[[bytes | memoryview], int] = lambda data: os.write(fd, data)
        with contextlib.suppress(OSError):  # not a descriptor: writing to it reports the error
            about = os.fstat(fd)
            if stat.S_ISSOCK(about.st_mode):
                self._send()
            elif stat.S_ISFIFO(about.st_mode) or os.isatty(fd):
                self._reopen(may=about.st_rdev != _PTMX)

    def _send(self) -> None:
        import socket  # only few consoles are sockets

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
        """Return the descriptor to poll for POLLOUT."""
        return self._fd

    def write(self, data: bytes | memoryview) -> int:
        """Write without waiting, and return the number of bytes written. Raises OSError.

        After 0, wait for POLLOUT with a timeout: another writer may use the room first.
        """
        try:
            return self._write(data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close its own description. Idempotent. Do not write afterwards."""
        close, self._close = self._close, lambda: None
        close()
