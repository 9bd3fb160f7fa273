# SPDX-License-Identifier: Apache-2.0
"""The host's end of a guest's vsock: a Unix socket that programs connect to and name a port of the guest.

Firecracker's convention: a client sends ``CONNECT <port>\\n`` and reads ``OK <port of the host's side>\\n`` once the
guest has accepted; where it does not, the connection is closed. A :class:`Door` owns the listening socket, its name in
the file system, and the clients that have not said which port they want; at most ``MOST_GUESTS`` of them, the oldest of
which has to go for another. Used by one thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import stat
from collections.abc import Callable

from pyvmm.devices.virtio.vsock_packet import PORT_ANY
from pyvmm.devices.virtio.vsock_table import Watch
from pyvmm.errors import HostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

MOST_GUESTS: Final = 32
_MOST_LINE: Final = 32
_ACCEPTED_AT_ONCE: Final = 16
_LINE: Final = re.compile(rb"connect +([0-9]{1,10})\r?\n", re.IGNORECASE)
LONGEST_ADDRESS: Final = 107
"""Bytes of a Unix socket's path, without the NUL behind it (unix(7))."""
LONGEST_PATH: Final = LONGEST_ADDRESS - len("_4294967295")
"""Bytes of a path that leave room for a port behind it in a Unix socket's address."""


class Door:
    """Listens at ``path`` while it is open; ``connect`` takes a client's socket and the port it asked for.

    UsageError where the path cannot be listened at; a socket that a program has left behind there is replaced. Without
    ``listen`` only the path is checked, and the door stays shut.
    """

    def __init__(
        self, path: str, connect: Callable[[socket.socket, int], object], watch: Watch, *, listen: bool = True
    ) -> None:
        self._path = path
        self._connect = connect
        self._watch = watch
        self._clients: dict[int, tuple[socket.socket, bytes]] = {}
        self._open = False
        _check(path)
        self._listener = _listen(path) if listen else None
        self._id = _identity(path)

    def open(self) -> None:
        """Accept clients from now on, including waiting ones. Idempotent. Call it again when descriptors may be free,
        after accepting failed for lack of them.
        """
        if not self._open and self._listener is not None:
            self._open = True
            self._watch(self._listener.fileno(), select.POLLIN)

    def shut(self) -> None:
        """Stop accepting, and disconnect clients without a request. Idempotent."""
        if self._open and self._listener is not None:
            self._open = False
            self._watch(self._listener.fileno(), None)
        for fd in list(self._clients):
            self._take(fd).close()

    def close(self) -> None:
        """Stop listening, and remove the name if it is still this socket's."""
        self.shut()
        if self._listener is None:
            return
        self._listener.close()
        if _identity(self._path) == self._id:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def ready(self, fd: int) -> bool:
        """Handle a readable watched descriptor. False if it is not one of these."""
        if self._listener is not None and fd == self._listener.fileno():
            self._accept(self._listener)
        elif fd in self._clients:
            self._hear(fd)
        else:
            return False
        return True

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                # No descriptors left: it waits until one is let go of, and would be told of again and again.
                self._open = False
                self._watch(listener.fileno(), None)
                return
            client.setblocking(False)
            if len(self._clients) >= MOST_GUESTS:
                self._take(next(iter(self._clients))).close()
            self._clients[client.fileno()] = client, b""
            self._watch(client.fileno(), select.POLLIN)

    def _hear(self, fd: int) -> None:
        client, line = self._clients[fd]
        try:
            # What comes behind the line is for the guest: no byte more than the line is taken.
            ahead = client.recv(_MOST_LINE - len(line), socket.MSG_PEEK)
            end = ahead.find(b"\n") + 1 or len(ahead)
            line += client.recv(end) if end else b""
        except BlockingIOError:
            return
        except OSError:
            end = 0
        if end and not line.endswith(b"\n") and len(line) < _MOST_LINE:
            self._clients[fd] = client, line
            return
        self._take(fd)
        asked = _LINE.fullmatch(line)
        if asked is None or int(asked[1]) >= PORT_ANY:
            client.close()
            self.open()
        else:
            self._connect(client, int(asked[1]))

    def _take(self, fd: int) -> socket.socket:
        self._watch(fd, None)
        return self._clients.pop(fd)[0]


def _check(path: str) -> None:
    name = os.fsencode(path)
    if not name or b"\0" in name or len(name) > LONGEST_PATH:
        raise UsageError(
            f"the vsock path {path!r} has {len(name)} bytes: 1 to {LONGEST_PATH} can be the address of a Unix socket "
            "with a port behind it",
            hint="use a shorter path, or one relative to the working directory",
        )


def _listen(path: str) -> socket.socket:
    _make_way(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)  # the file gets this mode when it is made
        listener.bind(os.fsencode(path))
        listener.listen(MOST_GUESTS)
    except OSError as error:
        listener.close()
        raise UsageError(f"the vsock path {path!r} cannot be listened at: {error.strerror}") from None
    return listener


def _make_way(path: str) -> None:
    """Remove a socket without a listener. Raises UsageError if the path is in use."""
    try:
        about = os.lstat(path)
    except OSError:
        return  # nothing is there, or the bind will say what is wrong
    if not stat.S_ISSOCK(about.st_mode):
        raise UsageError(
            f"the vsock path {path!r} exists and is not a socket: it is not replaced", hint="name a path that is free"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                raise HostError(f"the vsock path {path!r} cannot be looked at: {error.strerror}") from None
    raise UsageError(
        f"the vsock path {path!r} is in use: a program, another VM perhaps, listens there",
        hint="name another path: each VM needs its own; --vsock uds=PATH,cid=N gives it one, also with --restore",
    )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        about = os.lstat(path)
    except OSError:
        return None
    return about.st_dev, about.st_ino
