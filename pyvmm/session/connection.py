# SPDX-License-Identifier: Apache-2.0
"""Send requests to a run in another process: the client's side of :mod:`pyvmm.session.control`.

A :class:`Connection` owns a connection and the pidfd of the run's process, where the process can be seen. It believes
that a run has ended when the run says so or its process is gone. The end of a connection alone does not tell that.
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.session.control import BREATH, FORMAT, SUFFIX, Gone, connect, directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, Final, Self

PATIENCE: Final = 2.0
"""Seconds that a run has to answer."""
_DYING: Final = 2.0
"""Seconds that a process which closed the connection may need to be gone."""
_MOST: Final = 1 << 24
"""Maximum bytes of an answer."""
_BUSY: Final = object()


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
    for name in {_put_back(where, name) for name in names}:
        pid, path = name.removesuffix(SUFFIX), f"{where}/{name}"
        if name.endswith(SUFFIX) and pid.isdecimal():
            with contextlib.suppress(OSError):  # the run has ended meanwhile
                inode = os.lstat(path).st_ino
                try:
                    connect(path).close()
                    pids.append(int(pid))
                except Gone:
                    _remove(path, inode)
    return sorted(pids)


def _remove(path: str, inode: int) -> None:
    """Remove the socket ``inode`` of a killed run, unless a new run of the same pid has taken its name meanwhile."""
    aside = f"{path}.{os.getpid()}"
    os.rename(path, aside)  # nothing looks at a name and removes it in one step
    if os.lstat(aside).st_ino == inode:
        os.unlink(aside)
    else:
        os.rename(aside, path)


def _put_back(where: str, name: str) -> str:
    """Return ``name``; of a socket that a killed process left aside, the name that it has again."""
    first, suffix, remover = name.rpartition(f"{SUFFIX}.")
    if not suffix or not remover.isdecimal() or os.path.exists(f"/proc/{remover}"):
        return name
    back = first + SUFFIX
    with contextlib.suppress(OSError):  # another process puts it back, or a new run has the name
        os.link(f"{where}/{name}", f"{where}/{back}", follow_symlinks=False)
    with contextlib.suppress(OSError):
        os.unlink(f"{where}/{name}")
    return back


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


class Connection:
    """A connection to the run of process ``where``, or to the socket at that path. A context manager.

    If it has to give way to other clients, it is made again. Raises UsageError if no run listens there.
    """

    def __init__(self, where: int | str) -> None:
        self._path = f"{directory()}/{where}{SUFFIX}" if isinstance(where, int) else where
        self.name = f"process {where}" if isinstance(where, int) else f"the run at {where}"
        try:
            self._connect()
        except Gone:
            raise UsageError(
                f"{self.name} runs no guest that can be controlled: nobody listens at {self._path}"
                if isinstance(where, int)
                else f"nobody listens at {self._path}",
                hint="pyvmm top lists the runs; a run makes its socket a quarter of a second after its start",
            ) from None
        self._pidfd = _pidfd(self._socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        if self._pidfd is not None:
            os.close(self._pidfd)

    def ask(self, what: str, *, patience: float = PATIENCE, **members: object) -> Any | None:
        """Return the answer to ``what`` within ``patience`` seconds, or None if the run has ended.

        ``members`` are added to the request. Raises PyvmmError if it is refused, or if there is no answer in that time.
        """
        import json

        request = json.dumps({"do": what, **members}).encode() + b"\n"
        until = time.monotonic() + patience
        try:
            answer = self._answer(request, until)
            while answer is _BUSY and time.monotonic() < until:
                time.sleep(BREATH)
                self._connect_again()
                answer = self._answer(request, until)
        except TimeoutError:
            raise PyvmmError(f"{self.name} does not answer; is it stopped?") from None
        except Gone:
            answer = None
        if answer is _BUSY:
            raise PyvmmError(f"{self.name} is busy: it has too many clients, and others came before this one")
        if not isinstance(answer, dict):
            if self._has_ended(time.monotonic() + _DYING):
                return None
            raise PyvmmError(
                f"{self.name} closed the connection without an answer to {what!r}, but has not ended",
                hint="pyvmm ctl info tells its state",
            )
        if "ended" in answer:
            return None
        if what in answer:
            return answer[what]
        if "known" in answer or "error" not in answer:
            raise PyvmmError(
                f"{self.name} does not do {what!r}: {answer.get('error', answer)}",
                hint="is it another version of pyvmm?",
            )
        raise PyvmmError(f"{self.name}: {answer['error']}", hint=answer.get("hint"))

    def wait_for_end(self, patience: float) -> bool:
        """Wait until the run says that it has ended, or its process is gone. Returns False after ``patience`` seconds.

        Another request cannot follow.
        """
        until = time.monotonic() + patience
        while time.monotonic() < until:
            try:
                line = self._line(until)
            except TimeoutError:
                break
            except OSError:
                line = None
            if isinstance(line, dict) and "ended" in line:
                return True
            if line is None or "busy" in line:
                if self._pidfd is not None:
                    return self._has_ended(until)
                time.sleep(BREATH)
                try:
                    self._connect_again()
                except Gone:
                    return True
        return False

    def _has_ended(self, until: float) -> bool:
        """Return whether the run's process is gone, and wait for that. If it cannot be seen, nobody may listen."""
        if self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return bool(poll.poll(max(0.0, 1000 * (until - time.monotonic()))))
        try:
            connect(self._path).close()
        except Gone:
            return True
        return False

    def _connect(self) -> None:
        self._socket = connect(self._path)
        self._rest = b""

    def _connect_again(self) -> None:
        self._socket.close()
        self._connect()
        if self._pidfd is not None and self._has_ended(0.0):  # another run may have the path by now
            raise Gone(self._path)

    def _answer(self, request: bytes, until: float) -> object:
        """Return the next line after ``request``, None at the connection's end, or _BUSY if it must be asked again."""
        try:
            self._socket.settimeout(max(0.001, until - time.monotonic()))
            # After an error there may still be a line that says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._socket.sendall(request)
            answer = self._line(until)
        except TimeoutError:
            raise
        except OSError:
            return None
        return _BUSY if answer is not None and "busy" in answer else answer

    def _line(self, until: float) -> dict[str, Any] | None:
        """Return the next line from the run, or None at the connection's end. Raises OSError, of it TimeoutError."""
        import json

        while b"\n" not in self._rest:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            data = self._socket.recv(1 << 16)
            if not data:
                return None
            self._rest += data
            if len(self._rest) > _MOST:
                raise PyvmmError(f"{self.name} answers with more than {_MOST} bytes", hint=_OTHER)
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise PyvmmError(f"{self.name} does not answer with a JSON object", hint=_OTHER)
        if (number := said.pop("format", FORMAT)) != FORMAT:
            raise PyvmmError(
                f"{self.name} answers in format {number!r}, but this pyvmm reads format {FORMAT}",
                hint="use the pyvmm that runs it",
            )
        return said


_OTHER: Final = "does a pyvmm listen there?"


def _pidfd(connection: socket.socket) -> int | None:
    """Return a descriptor of the process that listens there, None if it cannot be seen from here."""
    import socket
    import struct

    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", peer)
    if pid <= 0:  # of another pid namespace
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
