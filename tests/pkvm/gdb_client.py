# SPDX-License-Identifier: Apache-2.0
"""A small debugger: GDB's remote protocol over a unix socket, for tests that check every packet."""

from __future__ import annotations

import socket
from typing import Self

from pyvmm.debug.packets import Decoder, Token, frame
from pyvmm.debug.registers import NUMBER, REGISTERS

TIMEOUT = 60.0


class Client:
    """One connection, acknowledgements off unless ``acks``."""

    def __init__(self, path: str, *, acks: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(path)
        self._decoder = Decoder()
        self._events: list[bytes | Token] = []
        self.acks = True
        if not acks:
            assert self.ask("QStartNoAckMode") == "OK"
            self.socket.sendall(b"+")
            self.acks = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, packet: str | bytes) -> None:
        """Send a packet and wait for nothing."""
        self.socket.sendall(frame(packet.encode() if isinstance(packet, str) else packet))

    def answer(self) -> str:
        """Wait for a packet and return it; it may be empty. Raises EOFError if the connection is closed."""
        while True:
            while self._events:
                event = self._events.pop(0)
                if isinstance(event, bytes):
                    if self.acks:
                        self.socket.sendall(b"+")
                    return event.decode("latin-1")
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._events += self._decoder.feed(data)

    def ask(self, packet: str | bytes) -> str:
        """Send a packet and wait for its answer."""
        self.send(packet)
        return self.answer()

    def interrupt(self) -> str:
        """Stop the guest, as Ctrl-C does; returns the stop."""
        self.socket.sendall(b"\x03")
        return self.answer()

    def go(self, packet: str = "vCont;c") -> str:
        """Let the guest continue; returns its next stop."""
        return self.ask(packet)

    def register(self, name: str) -> int:
        """Read a register."""
        return int.from_bytes(bytes.fromhex(self.ask(f"p{NUMBER[name]:x}")), "little")

    def set_register(self, name: str, value: int) -> None:
        """Write a register."""
        number = NUMBER[name]
        data = value.to_bytes(REGISTERS[number].size, "little")
        assert self.ask(f"P{number:x}={data.hex()}") == "OK"

    def read(self, address: int, size: int) -> bytes:
        """Read memory. Raises ValueError with the answer if the server refuses."""
        answer = self.ask(f"m{address:x},{size:x}")
        if answer.startswith("E"):
            raise ValueError(answer)
        return bytes.fromhex(answer)

    def write(self, address: int, data: bytes) -> str:
        """Write memory; returns the answer."""
        return self.ask(f"M{address:x},{len(data):x}:{data.hex()}")

    def monitor(self, command: str) -> str:
        """Give a monitor command; returns what it says."""
        return bytes.fromhex(self.ask(f"qRcmd,{command.encode().hex()}")).decode()


def field(stop: str, name: str) -> str | None:
    """Return a field of a stop reply, such as ``thread`` or ``hwbreak``."""
    for part in stop[3:].split(";"):
        key, _, value = part.partition(":")
        if key == name:
            return value
    return None
