# SPDX-License-Identifier: Apache-2.0
"""Control a running guest from other processes, through a per-user socket of each ``pyvmm run``.

A :class:`Control` owns the socket ``PID.sock`` in the user's directory for such files, another where the user named
one, and one thread (``pyvmm-control``), in the process that runs the guest. The vCPUs are not involved. A run that ends
within SETTLED seconds makes no socket unless the user named one. :mod:`pyvmm.session.connection` is the client's side.

Each line is a JSON object. A request such as ``{"do": "kick", "text": "ls"}`` gets one line: ``{"kick": ...}``, or
``{"error": "...", "hint": ...}``. Each line from the run has the number ``format``, and a request may have it. Two
lines answer no request, and are the connection's last. After ``{"ended": true}`` there is no guest any more. After
``{"busy": "..."}`` the run goes on and has not carried out what it did not answer: the connection was idle for longest,
and gave way to another client.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import threading
import time

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.log import get_logger

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import Final, Self

    Requests = Mapping[str, Callable[..., object]]

log = get_logger("control")

FORMAT: Final = 1
"""Of the lines. Lines without a number have the meaning of format 1, but nothing tells that the run has ended."""
SETTLED: Final = 0.25
"""Seconds after which a run makes its socket."""
PATIENCE: Final = 2.0
"""Seconds to wait for a connection to be made."""
BREATH: Final = 0.1
"""Seconds until a failed accept is tried again."""
MOST_CLIENTS: Final = 16
MOST_LINE: Final = 1 << 16
SUFFIX: Final = ".sock"
_SELDOM: Final = 10.0
"""Seconds between two log lines about requests that failed."""


def directory() -> str:
    """Return the directory of this user's sockets. It may not exist."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):  # the specification says to ignore a relative one
        return f"{runtime}/pyvmm"
    return f"/tmp/pyvmm-{os.geteuid()}" if os.geteuid() else "/run/pyvmm"


class Control:
    """Answers requests while it is entered. ``requests`` has a function for each value of ``do``.

    These functions run in the thread, one at a time, with the request's other members as keyword arguments. An
    exception becomes the error answer. ``named`` is the path of a second socket, which exists from the start. Raises
    UsageError if that cannot be made. If our own directory or socket cannot be made, an event is logged and the run
    continues.

    The thread never waits for a client. Of too many clients, those give way that were idle for longest.

    ``held`` makes both sockets at once, even for a short run, and leaves the thread to :meth:`start`.
    """

    def __init__(self, requests: Requests, named: str | None = None, *, held: bool = False) -> None:
        self._requests = requests
        self._named = named
        self._held = held
        self._clients: dict[int, _Client] = {}
        self._silent_until = 0.0
        self._failures = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as half:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            half.callback(os.close, self._wake)
            self._listeners = [] if self._named is None else [_listen_named(self._named, half)]
            self._paths = [] if self._named is None else [self._named]
            self._thread = threading.Thread(target=self._main, name="pyvmm-control", daemon=True)
            if self._held:
                self._listen_own(half)
            else:
                self.start()
            half.callback(self._end)
            self._stack = half.pop_all()
        return self

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def _end(self) -> None:
        if self._thread.ident is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()

    @property
    def directories(self) -> list[str]:
        """The directories of the sockets that there are."""
        return [os.path.dirname(os.path.abspath(path)) for path in self._paths]

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _main(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [client.close() for client in self._clients.values()])
            # A short run makes no socket. A named socket exists from the start.
            if not self._held:
                if self._serve(time.monotonic() + SETTLED):
                    return
                self._listen_own(stack)
            if self._listeners:
                self._serve()

    def _listen_own(self, stack: contextlib.ExitStack) -> None:
        try:
            path = f"{_own_directory()}/{os.getpid()}{SUFFIX}"
            self._listeners.append(_listen(path, stack))
        except (OSError, PyvmmError) as error:
            log.info("control_unavailable", reason=str(error))
        else:
            self._paths.append(path)

    def _serve(self, until: float | None = None) -> bool:
        """Serve until the end (True) or a point in time (False)."""
        clients, listeners = self._clients, {listener.fileno(): listener for listener in self._listeners}
        accepting = 0.0
        while True:
            now = time.monotonic()
            if until is not None and now >= until:
                return False
            watched = {self._wake: select.POLLIN} | {client.fd: client.waits_for for client in clients.values()}
            if now >= accepting:
                watched |= dict.fromkeys(listeners, select.POLLIN)
            moments = [moment - now for moment in (until, accepting) if moment is not None and moment > now]
            if any(client.has_line for client in clients.values()):
                moments.append(0.0)
            ready = _polled(watched, min(moments, default=None))
            if self._wake in ready:
                for client in clients.values():
                    client.say_last({"ended": True})
                return True
            for client in list(clients.values()):
                if not client.serve(client.fd in ready, self._answer):
                    self._drop(client)
            for fd in ready & listeners.keys():
                try:
                    client = _Client(listeners[fd].accept()[0])
                except OSError as error:
                    # No descriptors left: the client stays in the queue, and would be reported again at once.
                    log.info("control_client_waits", reason=str(error))
                    accepting = time.monotonic() + BREATH
                    continue
                if len(clients) >= MOST_CLIENTS:
                    idle = min(clients.values(), key=lambda each: each.active)
                    idle.say_last({"busy": f"the run has more than {MOST_CLIENTS} clients"})
                    self._drop(idle)
                clients[client.fd] = client

    def _drop(self, client: _Client) -> None:
        del self._clients[client.fd]
        client.close()

    def _answer(self, line: bytes) -> dict[str, object]:
        import json

        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return {"error": "the request is not JSON"}
        if not isinstance(request, dict):
            return {"error": "the request is not a JSON object"}
        if (number := request.pop("format", FORMAT)) != FORMAT:
            return {"error": f"the request has the format {number!r}, but this run knows format {FORMAT}"}
        what = request.pop("do", None)
        if not isinstance(what, str) or what not in self._requests:
            return {"error": f"unknown request: {what!r}", "known": sorted(self._requests)}
        return self._carried_out(what, request)

    def _carried_out(self, what: str, members: dict[str, object]) -> dict[str, object]:
        import inspect
        import json

        handle = self._requests[what]
        try:
            inspect.signature(handle).bind(**members)
        except TypeError as error:
            return {"error": f"invalid arguments for {what!r}: {error}"}
        except ValueError:
            pass  # a C function without a signature checks its own arguments
        try:
            answer: dict[str, object] = {what: handle(**members)}
            json.dumps(answer)
        except PyvmmError as error:
            return {"error": error.message, "hint": error.hint}
        except Exception as error:
            self._log_failure(what, error)
            return {"error": f"{type(error).__name__}: {error}"}
        return answer

    def _log_failure(self, what: str, error: Exception) -> None:
        """Log an error in our code, with those that were not logged because there was one just before."""
        self._failures += 1
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + _SELDOM
            log.error("request_failed", request=what, error=f"{type(error).__name__}: {error}", count=self._failures)
            log.debug("request_failed", request=what, exc_info=error)
            self._failures = 0


class _Client:
    """One connection, on the server's side. Nothing here waits.

    A client that does not read gets no further request carried out, so that what waits for it is one answer at most.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._received = b""
        self._unsent = b""
        self.fd = connection.fileno()
        self.close = connection.close
        self.active = time.monotonic()
        """When it came, or its last request was answered."""

    @property
    def has_line(self) -> bool:
        """Whether a request waits that can be answered now."""
        return not self._unsent and b"\n" in self._received

    @property
    def waits_for(self) -> int:
        """The events of poll(2) that it waits for."""
        return select.POLLOUT if self._unsent else 0 if self.has_line else select.POLLIN

    def serve(self, ready: bool, answer: Callable[[bytes], object]) -> bool:
        """Go on as far as possible, but with one request only. Returns False when the connection has ended."""
        try:
            if self._unsent:
                return not ready or self._send()
            if not self.has_line:
                return not ready or self._receive()
            line, _, self._received = self._received.partition(b"\n")
            said = answer(line)
            self.active = time.monotonic()
            return self._say(said)
        except BlockingIOError:
            return True
        except OSError:
            return False

    def say_last(self, words: dict[str, object]) -> None:
        """Say this as the last line, if the client has read all lines before it."""
        if not self._unsent:
            with contextlib.suppress(OSError):
                self._say(words)

    def _receive(self) -> bool:
        data = self._connection.recv(MOST_LINE)
        self._received += data
        if len(self._received) < MOST_LINE or b"\n" in self._received:
            return bool(data)
        self.say_last({"error": f"the request is longer than {MOST_LINE} bytes"})
        return False

    def _say(self, words: object) -> bool:
        import json

        line = {"format": FORMAT, **words} if isinstance(words, dict) else words
        self._unsent = json.dumps(line).encode() + b"\n"
        return self._send()

    def _send(self) -> bool:
        self._unsent = self._unsent[self._connection.send(self._unsent) :]
        return True


def _polled(watched: Mapping[int, int], seconds: float | None) -> set[int]:
    """Wait for events of these descriptors, for ``seconds`` at most. Returns the descriptors that have some."""
    poll = select.poll()
    for fd, events in watched.items():
        poll.register(fd, events)
    return {fd for fd, _ in poll.poll(None if seconds is None else 1000 * seconds)}


def _own_directory() -> str:
    """Make the directory if it is missing. Raises PyvmmError if other users could write to it."""
    path = directory()
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    about = os.lstat(path)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise PyvmmError(f"{path} must be a directory that only this user can write to")
    return path


def _listen_named(path: str, stack: contextlib.ExitStack) -> socket.socket:
    """Listen at a path that the user named. Raises UsageError if it is in use or not a socket."""
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"--socket {path}: the path exists and is not a socket", hint="name a path that is free")
    try:
        return _listen(path, stack)
    except _InUse:
        raise UsageError(
            f"--socket {path} is in use: a process answers there", hint="end it, or name another path"
        ) from None
    except OSError as error:
        raise UsageError(f"--socket {path} cannot be made: {error.strerror or error}") from None


def _listen(path: str, stack: contextlib.ExitStack) -> socket.socket:
    import socket

    # A socket without a listener is left from a dead process. Names in our directory are process IDs, so a socket with
    # a listener belongs to another pid namespace.
    if os.path.lexists(path):
        with contextlib.suppress(Gone):
            connect(path).close()
            raise _InUse(f"{path} is in use by a process with the same ID in another pid namespace")
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.ExitStack() as half:
        half.callback(listener.close)
        # The socket gets its name once it listens. A socket that does not listen is left from a killed run, and any run
        # removes it.
        young = f"{path}.new"
        _unlink(young)
        os.fchmod(listener.fileno(), 0o600)  # the file gets this mode when it is made
        listener.bind(young)
        half.callback(_unlink, young)
        listener.listen()
        made = os.stat(young).st_ino
        os.rename(young, path)
        stack.callback(listener.close)
        stack.callback(_unlink, path, made)
        half.pop_all()
    return listener


def _unlink(path: str, inode: int | None = None) -> None:
    """Remove a socket if it exists; with ``inode``, only if it is still the same one."""
    with contextlib.suppress(OSError):
        if inode is None or os.lstat(path).st_ino == inode:
            os.unlink(path)


class _InUse(PyvmmError):
    """A process listens there."""


# -- what both sides need


class Gone(PyvmmError):
    """Nobody listens there."""


def connect(path: str, patience: float = PATIENCE) -> socket.socket:
    """Return a connection to the socket at ``path``, made within ``patience`` seconds.

    Raises Gone if nobody listens there, another PyvmmError if it cannot be made.
    """
    import socket

    until = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(patience)
        try:
            connection.connect(path)
        except BlockingIOError:
            connection.close()
            if time.monotonic() > until:
                raise PyvmmError(f"{path} is busy: too many clients wait to be accepted") from None
            time.sleep(BREATH)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            raise Gone(path) from None
        except OSError as error:
            connection.close()
            raise PyvmmError(f"{path} cannot be connected to: {error.strerror or error}") from None
        else:
            return connection
