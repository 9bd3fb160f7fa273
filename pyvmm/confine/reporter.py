# SPDX-License-Identifier: Apache-2.0
"""A process that reports the system calls which a filter would refuse, and lets them happen.

A :class:`Reporter` owns the child process and the socket to it. The child ends when the filtered process has ended.
It is another process, because a thread may wait for the report of a call while it holds Python's lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
from ctypes import byref

from pyvmm.confine import kernel
from pyvmm.interrupt import ENDING
from pyvmm.log import get_logger
from pyvmm.uapi import seccomp
from pyvmm.uapi.unistd import MACHINES, NUMBERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from ctypes import Structure
    from typing import Final

    from pyvmm.uapi.ioctl import Ioctl

log = get_logger("confine")

MOST: Final = 10
"""Reports of one call. A total follows at the end."""

_PATHS: Final = {"openat": 1, "unlinkat": 1, "mkdirat": 1, "renameat": 1, "faccessat": 1, "readlinkat": 1, "execve": 0}
"""The argument of some calls that is a path."""
_LONGEST: Final = 256


class Reporter:
    """Reports for this process. Make it before there is a second thread."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        if os.fork() == 0:
            try:
                self._socket.close()
                _report(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def take(self, listener: int) -> None:
        """Hand over the filter's descriptor."""
        socket.send_fds(self._socket, [b"."], [listener])
        os.close(listener)
        self._socket.close()


def _report(connection: socket.socket) -> None:
    """Be the child: report until the filtered process has ended."""
    for number in ENDING:  # meant for the run, whose calls wait for this process to its end
        signal.signal(number, signal.SIG_IGN)
    _, fds, _, _ = socket.recv_fds(connection, 1, 1)
    connection.close()
    if not fds:
        return
    counts: dict[str, int] = {}
    poll = select.poll()
    poll.register(fds[0], select.POLLIN)
    while not any(events & select.POLLHUP for _, events in poll.poll()):
        notice = seccomp.seccomp_notif()
        if _exchanged(fds[0], seccomp.SECCOMP_IOCTL_NOTIF_RECV, notice):
            call = _name(notice.data.nr)
            counts[call] = counts.get(call, 0) + 1
            if counts[call] <= MOST:
                log.warning(
                    "would_refuse", call=call, **_told(call, notice.pid, list(notice.data.args)), thread=notice.pid
                )
            goes_on = seccomp.seccomp_notif_resp(id=notice.id, flags=seccomp.SECCOMP_USER_NOTIF_FLAG_CONTINUE)
            _exchanged(fds[0], seccomp.SECCOMP_IOCTL_NOTIF_SEND, goes_on)
    for call, count in counts.items():
        if count > MOST:
            log.warning("would_refuse_more", call=call, times=count)


def _exchanged(listener: int, request: Ioctl, message: Structure) -> bool:
    """Make a request of the listener. False: the thread has ended, or a signal came. Raises OSError otherwise."""
    try:
        kernel.call("ioctl", listener, request.number, byref(message))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return False
        raise
    return True


def _name(nr: int) -> str:
    at = MACHINES.index(kernel.MACHINE)
    return next((name for name, numbers in NUMBERS.items() if numbers[at] == nr), f"call {nr}")


def _told(call: str, tid: int, arguments: Sequence[int]) -> dict[str, str]:
    """Return the arguments: the registers, and the path if it is known and may be read."""
    told = {"arguments": " ".join(hex(argument) for argument in arguments)}
    if call in _PATHS:
        with contextlib.suppress(OSError), open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
            path = os.pread(memory.fileno(), _LONGEST, arguments[_PATHS[call]])
            told["path"] = os.fsdecode(path.partition(b"\0")[0])
    return told
