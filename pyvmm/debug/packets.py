# SPDX-License-Identifier: Apache-2.0
"""Frames of GDB's remote serial protocol: convert bytes to packets and back, without their meaning.

A frame is ``$payload#xx``, xx the sum of the payload's bytes in two hexadecimal digits; in the payload ``}`` stands
before a byte that would end it, XOR-ed with 0x20. Between frames there are acknowledgements, and 0x03: stop the guest.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, TypeAlias

PACKET_SIZE: Final = 0x4000
"""The maximum bytes of a payload on the wire."""

_DIGITS: Final = 2
_ESCAPE: Final = 0x7D
_FLIP: Final = 0x20


class Token(Enum):
    """Tokens other than a valid packet."""

    ACK = "+"
    NAK = "-"
    INTERRUPT = "interrupt"
    DAMAGED = "a packet whose sum is wrong"
    OVERLONG = "a packet longer than PACKET_SIZE"


Event: TypeAlias = "bytes | Token"
"""A packet's payload, escapes undone, or a token."""


def frame(payload: bytes) -> bytes:
    """Put an escaped ``payload`` into a frame."""
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


def escape(data: bytes) -> bytes:
    """Escape bytes for a payload."""
    return re.sub(rb"[#$}*]", lambda found: bytes((_ESCAPE, found[0][0] ^ _FLIP)), data)


def unescape(payload: bytes) -> bytes:
    """Undo :func:`escape`. A trailing ``}`` is dropped."""
    return re.sub(rb"(?s)}(.?)", lambda found: bytes(byte ^ _FLIP for byte in found[1]), payload)


class Decoder:
    """Finds packets in a stream of chunks. Keeps at most one packet's bytes. Never raises."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._overlong = False

    def feed(self, data: bytes) -> list[Event]:
        """Take received bytes. Returns the completed tokens, in order."""
        self._raw += data
        events: list[Event] = []
        while self._raw:
            if self._raw[0] != ord("$"):
                end = self._raw.find(b"$")
                between = self._raw[: end if end >= 0 else len(self._raw)]
                del self._raw[: len(between)]
                events += [_BETWEEN[byte] for byte in between if byte in _BETWEEN]
                continue
            event = self._packet()
            if event is None:
                break
            events.append(event)
        return events

    def _packet(self) -> Event | None:
        raw = self._raw
        end = raw.find(b"#")
        if (len(raw) if end < 0 else end) > PACKET_SIZE + 1:
            self._overlong = True
            del raw[1 : len(raw) if end < 0 else end]
            end = raw.find(b"#")
        if end < 0 or len(raw) < end + 1 + _DIGITS:
            return None
        # After a truncated packet, the next one's start follows.
        payload, digits = bytes(raw[1:end]).rpartition(b"$")[2], bytes(raw[end + 1 : end + 1 + _DIGITS])
        del raw[: end + 1 + _DIGITS]
        overlong, self._overlong = self._overlong, False
        if overlong:
            return Token.OVERLONG
        return unescape(payload) if _hex(digits) == sum(payload) & 0xFF else Token.DAMAGED


_BETWEEN: Final = {ord("+"): Token.ACK, ord("-"): Token.NAK, 0x03: Token.INTERRUPT}


def _hex(digits: bytes) -> int | None:
    try:
        return bytes.fromhex(digits.decode("ascii"))[0]
    except (ValueError, IndexError):
        return None
