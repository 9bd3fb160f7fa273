# SPDX-License-Identifier: Apache-2.0
"""Control a running guest from other processes, through a per-user socket of each ``pyvmm run``.

A :class:`Control` owns the socket ``PID.sock`` in the user's directory for such files, another where the user named
one, and one thread (``pyvmm-control``), in the process that runs the guest. A request is one line, a JSON object such
as ``{"do": "kick", "text": "ls"}``. The answer is one line too, ``{"kick": ...}`` or ``{"error": "...", "hint": ...}``.
:class:`Connection` is the client side. The vCPUs are not involved. A run that ends within SETTLED seconds makes no
socket unless the user named one.
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
    from typing import Any, Final, Self

    Requests = Mapping[str, Callable[..., object]]

log = get_logger("control")

SETTLED: Final = 0.25
"""Seconds after which a run makes its socket."""
PATIENCE: Final = 2.0
"""Seconds that each side waits for the other to read or write."""
BREATH: Final = 0.1
"""Seconds until a failed accept is tried again."""
MOST_CLIENTS: Final = 16
MOST_LINE: Final = 1 << 16
_SUFFIX: Final = ".sock"


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
    """

    def __init__(self, requests: Requests, named: str | None = None) -> None:
        self._requests = requests
        self._named = named
        self._clients: dict[int, _Client] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as half:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            half.callback(os.close, self._wake)
            self._listeners = [] if self._named is None else [_listen_named(self._named, half)]
            self._thread = threading.Thread(target=self._main, name="pyvmm-control", daemon=True)
            self._thread.start()
            half.callback(self._thread.join)
            half.callback(os.eventfd_write, self._wake, 1)
            self._stack = half.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _main(self) -> None:
        with contextlib.ExitStack() as stack:
            # A short run makes no socket. A named socket exists from the start.
            until = time.monotonic() + SETTLED
            if self._serve(self._listeners, stack, until):
                return
            try:
                own = _listen(f"{_own_directory()}/{os.getpid()}{_SUFFIX}", stack)
            except (OSError, PyvmmError) as error:
                log.info("control_unavailable", reason=str(error))
                if not self._listeners:
                    return
            else:
                self._listeners.append(own)
            self._serve(self._listeners, stack)

    def _serve(self, listeners: list[socket.socket], stack: contextlib.ExitStack, until: float | None = None) -> bool:
        """Serve until the end (True) or a point in time (False)."""
        clients = self._clients
        if not clients:
            stack.callback(lambda: [client.close() for client in clients.values()])
        poll = select.poll()
        for fd in (self._wake, *(listener.fileno() for listener in listeners), *clients):
            poll.register(fd, select.POLLIN)
        while True:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return False
            ready = dict(poll.poll(None if left is None else 1000 * left))
            if self._wake in ready:
                return True
            for fd in ready:
                if fd in clients and not clients[fd].serve(self._answer):
                    poll.unregister(fd)
                    clients.pop(fd).close()
            for listener in listeners:
                if listener.fileno() not in ready:
                    continue
                try:
                    client = _Client(listener.accept()[0])
                except OSError as error:
                    # No descriptors left: the client stays in the queue, and the selector would report it again at
                    # once.
                    log.info("control_client_waits", reason=str(error))
                    time.sleep(BREATH)
                    continue
                if len(clients) >= MOST_CLIENTS:
                    client.close()
                    continue
                clients[client.fd] = client
                poll.register(client.fd, select.POLLIN)

    def _answer(self, line: bytes) -> dict[str, object]:
        import inspect
        import json

        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return {"error": "the request is not JSON"}
        what = request.pop("do", None) if isinstance(request, dict) else None
        if not isinstance(what, str) or what not in self._requests:
            return {"error": f"unknown request: {what!r}", "known": sorted(self._requests)}
        handle = self._requests[what]
        try:
            inspect.signature(handle).bind(**request)
        except TypeError as error:
            return {"error": f"invalid arguments for {what!r}: {error}"}
        except ValueError:
            pass  # a C function without a signature checks its own arguments
        try:
            return {what: handle(**request)}
        except PyvmmError as error:
            return {"error": error.message, "hint": error.hint}
        except Exception as error:
            log.error("request_failed", request=what, error=str(error), exc_info=error)
            return {"error": f"{type(error).__name__}: {error}"}


class _Client:
    """One connection, on the server's side."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        self._connection = connection
        self._line = b""
        self.fd = connection.fileno()
        self.close = connection.close

    def serve(self, answer: Callable[[bytes], object]) -> bool:
        """Read, and answer complete lines. Returns False when the connection has ended."""
        import json

        try:
            data = self._connection.recv(MOST_LINE)
            *lines, self._line = (self._line + data).split(b"\n")
            for line in lines:
                self._connection.sendall(json.dumps(answer(line)).encode() + b"\n")
        except OSError:
            return False
        return bool(data) and len(self._line) < MOST_LINE


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
        with contextlib.suppress(_Gone):
            _connect(path).close()
            raise _InUse(f"{path} is in use by a process with the same ID in another pid namespace")
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.ExitStack() as half:
        half.callback(listener.close)
        # The socket gets its name once it listens. A socket that does not listen is left from a killed run, and any run
        # removes it.
        young = f"{path}.new"
        _unlink(young)
        listener.bind(young)
        half.callback(_unlink, young)
        os.chmod(young, 0o600)
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


# -- the client's side


class _Gone(PyvmmError):
    """Nobody listens there."""


def running() -> list[int]:
    """Return the pids of this user's runs, and remove the sockets of killed runs."""
    where = directory()
    try:
        names = os.listdir(where)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PyvmmError(f"{where} cannot be read: {error.strerror}") from None
    pids = []
    for name in names:
        pid = name.removesuffix(_SUFFIX)
        if name.endswith(_SUFFIX) and pid.isdecimal():
            try:
                _connect(f"{where}/{name}").close()
                pids.append(int(pid))
            except _Gone:
                _unlink(f"{where}/{name}")
    return sorted(pids)


class Connection:
    """A connection to the run of process ``where``, or to the socket at that path. A context manager.

    Raises UsageError if no run listens there.
    """

    def __init__(self, where: int | str) -> None:
        path = f"{directory()}/{where}{_SUFFIX}" if isinstance(where, int) else where
        self.name = f"process {where}" if isinstance(where, int) else f"the run at {where}"
        try:
            self._socket = _connect(path)
        except _Gone:
            raise UsageError(
                f"{self.name} runs no guest that can be controlled: nobody listens at {path}"
                if isinstance(where, int)
                else f"nobody listens at {path}",
                hint="pyvmm top lists the runs; a run makes its socket a quarter of a second after its start",
            ) from None
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def ask(self, what: str, *, patience: float = PATIENCE, **members: object) -> Any | None:
        """Return the answer to ``what`` within ``patience`` seconds, or None if the run has ended.

        ``members`` are added to the request. Raises PyvmmError if it is refused.
        """
        import json

        try:
            self._socket.settimeout(patience)
            self._socket.sendall(json.dumps({"do": what, **members}).encode() + b"\n")
            line = self._file.readline()
        except TimeoutError:
            raise PyvmmError(f"{self.name} does not answer; is it stopped?") from None
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        answer = json.loads(line)
        if what in answer:
            return answer[what]
        if "known" in answer or "error" not in answer:
            raise PyvmmError(
                f"{self.name} does not do {what!r}: {answer.get('error', answer)}",
                hint="is it another version of pyvmm?",
            )
        raise PyvmmError(f"{self.name}: {answer['error']}", hint=answer.get("hint"))

    def wait_for_end(self, patience: float) -> bool:
        """Wait until the run has ended. Returns False after ``patience`` seconds."""
        self._socket.settimeout(patience)
        try:
            return not self._file.read(1)
        except TimeoutError:
            return False
        except OSError:
            return True


def only_one() -> int:
    """Return the pid of this user's only run. Raises UsageError if none runs, or several."""
    pids = running()
    if len(pids) == 1:
        return pids[0]
    if pids:
        raise UsageError(
            f"{len(pids)} guests run, in processes {', '.join(map(str, pids))}",
            hint=f"name one, for example {pids[0]}",
        )
    raise UsageError(
        f"no guest of this user runs: no socket in {directory()}",
        hint="every --lab command starts a new lab: pyvmm --lab top KERNEL runs a guest and watches it",
    )


def _connect(path: str) -> socket.socket:
    import socket

    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise _Gone(path) from None
    except OSError as error:
        connection.close()
        raise PyvmmError(f"{path} cannot be connected to: {error.strerror or error}") from None
    return connection
