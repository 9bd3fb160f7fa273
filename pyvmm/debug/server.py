# SPDX-License-Identifier: Apache-2.0
"""Serve a debugger: a unix or TCP socket, its thread, and control of the guest.

A :class:`GdbServer` opens its socket in the constructor, so that an address in use is refused before a machine is
built. It owns one thread (``pyvmm-gdb``) while it serves. It accepts one debugger at a time. When a debugger detaches
or disconnects, the guest runs on without breakpoints, and another may connect.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from pyvmm.debug.monitor import answer
from pyvmm.debug.packets import Decoder, Token, frame
from pyvmm.debug.protocol import SIGINT, Session, Stop
from pyvmm.debug.target import GuestTarget
from pyvmm.errors import UsageError
from pyvmm.log import get_logger

if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu
    from pyvmm.machine.machine import Machine
    from pyvmm.vcpu.outcome import Outcome

log = get_logger("gdb")

LOCALHOST: Final = "127.0.0.1"
PATIENCE: Final = 5.0
"""Seconds that a debugger may take to read an answer."""
_CHUNK: Final = 1 << 16
_NOWAIT: Final = ",nowait"
_TCP: Final = "tcp:"


class GdbServer:
    """Listens at ``where``: a path, or ``tcp:[HOST:]PORT``; with ``,nowait`` the guest starts without a debugger.

    Raises UsageError if the place is invalid or in use.
    """

    def __init__(self, where: str) -> None:
        self.waits = not where.endswith(_NOWAIT)
        self.where = where.removesuffix(_NOWAIT)
        self._path: str | None = None
        self._socket = self._listen(self.where)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._target: GuestTarget | None = None
        self._outcome: Outcome | None = None
        self._closing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def directories(self) -> list[str]:
        """The directory of its socket, if that has a path."""
        return [] if self._path is None else [os.path.dirname(os.path.abspath(self._path))]

    def close(self) -> None:
        """Stop listening; idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            os.close(self._wake)
            if self._path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)

    @property
    def address(self) -> str:
        """The address for the debugger's ``target remote``."""
        if self._path is not None:
            return self._path
        host, port, *_ = self._socket.getsockname()
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def intercept(self, stop: int, native: pv_vcpu) -> bool | None:
        """Take a vCPU's stops (see :data:`pyvmm.vcpu.cold.Intercept`)."""
        return None if self._target is None else self._target.intercept(stop, native)

    @contextlib.contextmanager
    def serving(self, machine: Machine) -> Iterator[None]:
        """Serve ``machine``, which was built with :meth:`intercept` and not started. Call :meth:`ended` at its end.

        Raises HostError if the kernel lets nobody debug it.
        """
        self._target = GuestTarget(machine, self._ring)
        if self.waits:
            self._target.halt()
        thread = threading.Thread(target=self._main, name="pyvmm-gdb", daemon=True)
        thread.start()
        if self.waits:
            log.warning("waiting_for_debugger", gdb=f"target remote {self.address}")
        try:
            yield
        finally:
            self._closing = True
            self._ring()
            thread.join()

    def ended(self, outcome: Outcome) -> None:
        """Report the run's end to a debugger that waits for the guest."""
        self._outcome = outcome
        self._ring()

    # -- inside

    def _listen(self, where: str) -> socket.socket:
        if not where:
            raise UsageError("no address for the debugger", hint="a path, or tcp:PORT")
        try:
            if where.startswith(_TCP):
                address, family = _tcp(where)
                return socket.create_server(address, family=family, backlog=1)
            listener = socket.socket(socket.AF_UNIX)
            try:
                # The file gets this mode when it is made: a client can read and write the guest.
                os.fchmod(listener.fileno(), 0o600)
                listener.bind(where)
                self._path = where
                listener.listen(1)
            except BaseException:
                listener.close()
                raise
            return listener
        except OSError as error:
            hint = None
            if error.errno == errno.EADDRINUSE:
                hint = "another run listens there; use another address"
                if not where.startswith(_TCP):
                    hint = f"another run listens there, or it is left from a killed run: rm {where}"
            raise UsageError(f"no debugger can connect at {where}: {error.strerror or error}", hint=hint) from None

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    def _main(self) -> None:
        target = self._target
        if target is None:
            return
        debugger: _Debugger | None = None
        while True:
            poll = select.poll()
            for fd in (self._wake, self._socket.fileno(), *([debugger.fd] if debugger else [])):
                poll.register(fd, select.POLLIN)
            ready = dict(poll.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
                if self._outcome is not None or self._closing:
                    if debugger is not None:
                        debugger.finish(self._outcome)
                    return
                if target.has_stopped:
                    if debugger is None:
                        target.detach()
                    elif not debugger.guest_stopped():
                        debugger = None
            if debugger is not None and debugger.fd in ready and not debugger.serve():
                debugger = None
            if self._socket.fileno() in ready:
                debugger = self._accept(debugger, target)

    def _accept(self, debugger: _Debugger | None, target: GuestTarget) -> _Debugger | None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            log.info("debugger_lost", reason=str(error))
            return debugger
        if debugger is not None:
            log.warning("second_debugger_refused")
            connection.close()
            return debugger
        debugger = _Debugger(connection, target)
        return debugger if debugger.begin() else None


class _Debugger:
    """One connection. Its methods return whether it is still open. When it is closed, the guest has been resumed."""

    def __init__(self, connection: socket.socket, target: GuestTarget) -> None:
        self._connection = connection
        self._target = target
        self._decoder = Decoder()
        self._session = Session(target, Stop(1), partial(answer, target))
        self._last = b""
        self.fd = connection.fileno()

    def begin(self) -> bool:
        """Stop the guest."""
        return self._kept(self._begin)

    def serve(self) -> bool:
        """Read and answer requests."""
        return self._kept(self._serve)

    def guest_stopped(self) -> bool:
        """Report a vCPU's debug exit."""
        return self._kept(self._tell_stop)

    def finish(self, outcome: Outcome | None) -> None:
        """Report the run's end if the debugger waits for it, and hang up."""
        with contextlib.suppress(OSError):
            if outcome is not None and self._session.running:
                self._send(self._session.ended(outcome.status))
        self._connection.close()

    # -- inside

    def _kept(self, do: Callable[[], None]) -> bool:
        try:
            do()
        except OSError as error:
            log.info("debugger_lost", reason=str(error))
        except Exception as error:
            # The guest must not stay stopped after any input from a debugger.
            log.error("debugger_dropped", error=str(error), exc_info=error)
        else:
            if not self._session.over:
                return True
        self._connection.close()
        if not self._session.over:
            self._target.detach()
        log.info("debugger_gone")
        return False

    def _begin(self) -> None:
        self._connection.settimeout(PATIENCE)
        if self._connection.family != socket.AF_UNIX:
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._session = Session(self._target, self._target.take_stop() or Stop(1), partial(answer, self._target))
        self._target.watched = True
        log.info("debugger_attached")

    def _serve(self) -> None:
        data = self._connection.recv(_CHUNK)
        if not data:
            raise ConnectionResetError("it hung up")
        for event in self._decoder.feed(data):
            match event:
                case bytes():
                    self._answer(event)
                case Token.INTERRUPT if self._session.running:
                    self._tell_stop()
                case Token.NAK:
                    self._connection.sendall(self._last)
                case Token.OVERLONG:
                    self._acknowledge(b"+")
                    if not self._session.running:
                        self._send(b"E22")
                case Token.DAMAGED:
                    self._acknowledge(b"-")
            if self._session.over:
                return

    def _answer(self, packet: bytes) -> None:
        self._acknowledge(b"+")
        # While the guest runs, only 0x03 is valid.
        if not self._session.running and (reply := self._session.handle(packet)) is not None:
            self._send(reply)

    def _tell_stop(self) -> None:
        stop = self._target.take_stop()
        if self._session.running:
            self._send(self._session.stopped(stop or Stop(1, SIGINT)))

    def _acknowledge(self, mark: bytes) -> None:
        if not self._session.no_acks:
            self._connection.sendall(mark)

    def _send(self, reply: bytes) -> None:
        self._last = frame(reply)
        self._connection.sendall(self._last)


def _tcp(where: str) -> tuple[tuple[str, int], socket.AddressFamily]:
    host, _, port = where.removeprefix(_TCP).rpartition(":")
    if not (port.isdecimal() and port.isascii() and int(port) < 1 << 16):
        raise UsageError(f"{where}: {port or 'nothing'} is not a TCP port", hint="use tcp:PORT or tcp:HOST:PORT")
    host = host.removeprefix("[").removesuffix("]") or LOCALHOST
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return (host, int(port)), family
