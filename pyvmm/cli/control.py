"""The way into a running guest from other processes: a socket for each ``pyvmm run``, of the user's own.

A :class:`Control` owns the socket ``PID.sock`` in the user's directory for such files and one thread
(``pyvmm-control``), in the process that runs the guest. A request is one line, a JSON object that says what to do,
``{"do": "counters"}``; the answer is one line too, ``{"counters": ...}`` or ``{"error": "..."}``. :func:`ask` is the
other side. The vCPUs have no part in it, and a run that nobody could ask, for it is short, never makes a socket.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.log import get_logger

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

log = get_logger("control")

SETTLED: Final = 0.25
"""Seconds after which a run is worth a socket."""
PATIENCE: Final = 2.0
"""Seconds that one side waits for the other to read or to write."""
MOST_CLIENTS: Final = 16
MOST_LINE: Final = 1 << 16
_SUFFIX: Final = ".sock"


def directory() -> str:
    """Return where this user's runs have their sockets; it need not be there."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/pyvmm"
    return f"/tmp/pyvmm-{os.geteuid()}" if os.geteuid() else "/run/pyvmm"


class Control:
    """Answers requests while it is entered; ``requests`` has a function for each word that may stand after ``do``.

    They run in the thread, one at a time. A directory or a socket that cannot be made is told as an event, and harms
    nothing else.
    """

    def __init__(self, requests: Mapping[str, Callable[[], object]]) -> None:
        self._requests = requests

    def __enter__(self) -> Self:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._main, name="pyvmm-control", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _main(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if poll.poll(1000 * SETTLED):
            return
        try:
            with contextlib.ExitStack() as stack:
                listener = stack.enter_context(_listen(f"{_own_directory()}/{os.getpid()}{_SUFFIX}", stack))
                self._serve(poll, listener, stack)
        except (OSError, PyvmmError) as error:
            log.info("control_unavailable", reason=str(error))

    def _serve(self, poll: select.poll, listener: socket.socket, stack: contextlib.ExitStack) -> None:
        clients: dict[int, _Client] = {}
        stack.callback(lambda: [client.close() for client in clients.values()])
        poll.register(listener, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._wake in ready:
                return
            for fd in ready:
                if fd in clients and not clients[fd].serve(self._answer):
                    poll.unregister(fd)
                    clients.pop(fd).close()
            if listener.fileno() in ready:
                client = _Client(listener.accept()[0])
                if len(clients) >= MOST_CLIENTS:
                    client.close()
                    continue
                clients[client.fd] = client
                poll.register(client.fd, select.POLLIN)

    def _answer(self, line: bytes) -> dict[str, object]:
        import json

        try:
            request = json.loads(line)
        except ValueError:
            return {"error": "that is no JSON"}
        what = request.get("do") if isinstance(request, dict) else None
        if not isinstance(what, str) or what not in self._requests:
            return {"error": f"what to do is not known: {what!r}", "known": sorted(self._requests)}
        return {what: self._requests[what]()}


class _Client:
    """One connection, on the side that answers."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        self._connection = connection
        self._line = b""
        self.fd = connection.fileno()
        self.close = connection.close

    def serve(self, answer: Callable[[bytes], object]) -> bool:
        """Take what has come and answer whole lines; False where the connection is over."""
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
    """Make the directory if it is not there. Raises PyvmmError for one that others could have a hand in."""
    path = directory()
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    about = os.lstat(path)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise PyvmmError(f"{path} is not a directory that this user alone can write to")
    return path


def _listen(path: str, stack: contextlib.ExitStack) -> socket.socket:
    import socket

    # The number is this process's: what has this name was left by one that is gone, or is of another pid namespace.
    if os.path.lexists(path):
        with contextlib.suppress(_Gone):
            _connect(path).close()
            raise PyvmmError(f"{path} is in use: it is of a process with the same number in another namespace")
    listener = socket.socket(socket.AF_UNIX)
    with contextlib.ExitStack() as half:
        half.callback(listener.close)
        # It gets its name when it listens: one that does not is what a killed run has left, and anyone removes it.
        young = f"{path}.new"
        _unlink(young)
        listener.bind(young)
        half.callback(_unlink, young)
        os.chmod(young, 0o600)
        listener.listen()
        os.rename(young, path)
        stack.callback(_unlink, path)
        half.pop_all()
    return listener


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


# -- the other side


class _Gone(PyvmmError):
    """Nobody listens there."""


def running() -> list[int]:
    """Return the pids of this user's runs; sockets that runs left behind when they were killed are removed."""
    where = directory()
    try:
        names = os.listdir(where)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PyvmmError(f"{where} cannot be read: {error.strerror}") from None
    found = []
    for name in names:
        pid = name.removesuffix(_SUFFIX)
        if name.endswith(_SUFFIX) and pid.isdecimal():
            try:
                _connect(f"{where}/{name}").close()
                found.append(int(pid))
            except _Gone:
                _unlink(f"{where}/{name}")
    return sorted(found)


class Connection:
    """A connection to the run of process ``pid``; a context manager. Raises PyvmmError where there is none."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        path = f"{directory()}/{pid}{_SUFFIX}"
        try:
            self._socket = _connect(path)
        except _Gone:
            raise UsageError(
                f"process {pid} runs no guest that can be watched: nobody listens at {path}",
                hint="pyvmm top lists those that can; a run has its socket a quarter of a second after its start",
            ) from None
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def ask(self, what: str) -> Any | None:
        """Return the answer to ``what``; None when the run is over. Raises PyvmmError where it is refused."""
        import json

        try:
            self._socket.sendall(json.dumps({"do": what}).encode() + b"\n")
            line = self._file.readline()
        except TimeoutError:
            raise PyvmmError(f"process {self.pid} does not answer; is it stopped?") from None
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        answer = json.loads(line)
        if what not in answer:
            raise PyvmmError(f"process {self.pid} does not do {what!r}: {answer.get('error', answer)}",
                             hint="is it another version of pyvmm?")  # fmt: skip
        return answer[what]


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
