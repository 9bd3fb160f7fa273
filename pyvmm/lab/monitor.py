# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor (QMP): save a running machine's state, and restore it into a waiting machine.

Owns its socket. If the guest's RAM is a shared file, the state excludes it, and the file must be saved as well.
"""

from __future__ import annotations

import json
import socket
from typing import Any, Final

from pyvmm.errors import PyvmmError
from pyvmm.syntax.foreign import load_json

PATIENCE: Final = 30.0
"""Seconds that QEMU may take for one answer."""
WITHOUT_RAM: Final = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


class MonitorError(PyvmmError):
    """QEMU refused a request, or did not answer."""


class Monitor:
    """A connection over ``sock``. Its methods raise MonitorError."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.settimeout(PATIENCE)
        self._lines = sock.makefile("rb")

    def close(self) -> None:
        """Close the connection; the machine runs on."""
        self._lines.close()
        self._socket.close()

    def save(self) -> bytes:
        """Stop the machine for good and return its state."""
        self._greet()
        self._ask("migrate-set-capabilities", WITHOUT_RAM)
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._ask("getfd", {"fdname": "state"}, theirs)
            self._ask("migrate", {"uri": "fd:state"})
            state = self._read(ours)
        while (ended := self._ask("query-migrate"))["status"] != "completed":
            if ended["status"] in ("failed", "cancelled"):
                raise MonitorError(f"QEMU did not save the machine: {ended.get('error-desc', ended['status'])}")
        return state

    def restore(self, state: bytes) -> None:
        """Send ``state`` to a machine that waits for it. The machine then runs, or ends if it cannot load the state."""
        self._greet()
        self._ask("migrate-set-capabilities", WITHOUT_RAM)
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        with ours:
            with theirs:
                self._ask("getfd", {"fdname": "state"}, theirs)
            self._ask("migrate-incoming", {"uri": "fd:state"})
            try:
                ours.sendall(state)
            except OSError as error:
                raise MonitorError(f"QEMU did not take the saved state: {error}") from error

    def _greet(self) -> None:
        self._receive()  # its greeting
        self._ask("qmp_capabilities")

    def _ask(self, command: str, arguments: dict[str, Any] | None = None, fd: socket.socket | None = None) -> Any:
        words = json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"
        try:
            socket.send_fds(self._socket, [words], [fd.fileno()] if fd is not None else [])
        except OSError as error:
            raise MonitorError(f"QEMU does not listen to {command}: {error}") from error
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise MonitorError(f"QEMU refused {command}: {answer['error'].get('desc')}")
            # Anything else is an event.

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
            answer = load_json(line)
        except (OSError, ValueError) as error:
            raise MonitorError(f"QEMU's monitor gave no answer: {error}") from error
        if not isinstance(answer, dict):
            raise MonitorError(f"QEMU's monitor gave no object: {line[:80]!r}")
        return answer

    def _read(self, sock: socket.socket) -> bytes:
        sock.settimeout(PATIENCE)
        data = bytearray()
        try:
            while piece := sock.recv(1 << 20):
                data += piece
        except OSError as error:
            raise MonitorError(f"QEMU did not save the machine: {error}") from error
        return bytes(data)
