# SPDX-License-Identifier: Apache-2.0
"""Write Perfetto's trace format: the part for slices, instants, counters and flows.

A trace is a ``perfetto.protos.Trace``: packets, each with a time and a TrackEvent on one of the tracks described before
it (protos/perfetto/trace of Perfetto's tree, where the numbers are from; https://ui.perfetto.dev opens it). Strings are
interned. There is one sequence of packets; a track's events must be written in the order they happened.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

# Fields, named after their messages.
_TRACE_PACKET = 1
_PACKET_CLOCKS, _PACKET_TIME, _PACKET_SEQUENCE, _PACKET_EVENT, _PACKET_INTERNED, _PACKET_FLAGS = 6, 8, 10, 11, 12, 13
_PACKET_DEFAULTS, _PACKET_TRACK, _PACKET_FIRST = 59, 60, 87
_CLOCKS_CLOCK, _CLOCKS_PRIMARY, _CLOCK_ID, _CLOCK_TIME = 1, 2, 1, 2
_DEFAULTS_CLOCK = 58
_TRACK_UUID, _TRACK_NAME, _TRACK_PROCESS, _TRACK_THREAD, _TRACK_PARENT, _TRACK_COUNTER = 1, 2, 3, 4, 5, 8
_TRACK_CHILDREN, _TRACK_RANK, _TRACK_DESCRIPTION = 11, 12, 14
_PROCESS_PID, _PROCESS_NAME, _PROCESS_LABELS = 1, 6, 8
_THREAD_PID, _THREAD_TID, _THREAD_NAME = 1, 2, 5
_COUNTER_UNIT = 6
_EVENT_CATEGORY, _EVENT_NOTE, _EVENT_TYPE, _EVENT_NAME, _EVENT_TRACK = 3, 4, 9, 10, 11
_EVENT_COUNT, _EVENT_FLOW, _EVENT_LAST_FLOW = 30, 47, 48
_NOTE_NAME, _NOTE_BOOL, _NOTE_INT, _NOTE_TEXT, _NOTE_POINTER = 1, 2, 4, 6, 7
_INTERNED_ID, _INTERNED_NAME = 1, 2

CATEGORY, NAME, NOTE = 1, 2, 3
"""Tables of interned strings: fields of InternedData."""
BEGIN, END, INSTANT, COUNT = 1, 2, 3, 4
"""TrackEvent.Type."""
_REALTIME, _MONOTONIC, _BOOTTIME = 1, 3, 6
_CLEARED, _NEEDED = 1, 2
_EXPLICIT = 3
_SEQUENCE: Final = 1


class Pointer(int):
    """An annotation that is an address: shown in hexadecimal."""


Note = bool | int | str
"""What an annotation may be; integers of 64 bits with a sign, a Pointer without."""


class TrackEvent(NamedTuple):
    """An event without its time: the bytes before and behind it. It can be put as often as it happens."""

    head: bytes
    tail: bytes


class Writer:
    """Encodes a trace and hands it to ``write``, packet by packet. Times are nanoseconds of CLOCK_MONOTONIC.

    Tracks are numbered by the caller, from 1.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._known: dict[tuple[int, str], int] = {}
        self._upper, self._upper_bytes = -1, b""
        clocks = {_MONOTONIC: time.CLOCK_MONOTONIC, _BOOTTIME: time.CLOCK_BOOTTIME, _REALTIME: time.CLOCK_REALTIME}
        snapshot = b"".join(
            _message(_CLOCKS_CLOCK, _number(_CLOCK_ID, number) + _number(_CLOCK_TIME, time.clock_gettime_ns(clock)))
            for number, clock in clocks.items()
        )
        self._packet(_message(_PACKET_CLOCKS, snapshot + _number(_CLOCKS_PRIMARY, _MONOTONIC)))
        defaults = _message(_PACKET_DEFAULTS, _number(_DEFAULTS_CLOCK, _MONOTONIC))
        self._packet(_number(_PACKET_FLAGS, _CLEARED) + defaults + _number(_PACKET_FIRST, 1))

    # -- tracks

    def process(self, track: int, pid: int, name: str, labels: Iterable[str] = ()) -> None:
        """Describe a process; its threads and tracks stand below it, by their rank."""
        about = _number(_PROCESS_PID, pid) + _text(_PROCESS_NAME, name)
        about += b"".join(_text(_PROCESS_LABELS, label) for label in labels)
        self._track(track, _message(_TRACK_PROCESS, about) + _number(_TRACK_CHILDREN, _EXPLICIT))

    def thread(self, track: int, parent: int, pid: int, tid: int, name: str, description: str = "") -> None:
        """Describe a thread of a process; what is on its track must nest."""
        about = _number(_THREAD_PID, pid) + _number(_THREAD_TID, tid) + _text(_THREAD_NAME, name)
        body = _number(_TRACK_PARENT, parent) + _message(_TRACK_THREAD, about)
        self._track(track, body + (_text(_TRACK_DESCRIPTION, description) if description else b""))

    def track(self, track: int, parent: int, name: str, rank: int = 0, description: str = "") -> None:
        """Describe a track without a thread."""
        body = _number(_TRACK_PARENT, parent) + _text(_TRACK_NAME, name) + _number(_TRACK_RANK, rank)
        self._track(track, body + (_text(_TRACK_DESCRIPTION, description) if description else b""))

    def counter(self, track: int, parent: int, name: str, unit: str, rank: int = 0) -> None:
        """Describe a track of numbers."""
        body = _number(_TRACK_PARENT, parent) + _text(_TRACK_NAME, name) + _number(_TRACK_RANK, rank)
        self._track(track, body + _message(_TRACK_COUNTER, _text(_COUNTER_UNIT, unit)))

    def _track(self, track: int, body: bytes) -> None:
        self._packet(_message(_PACKET_TRACK, _number(_TRACK_UUID, track) + body))

    # -- events

    def event(
        self,
        kind: int,
        track: int,
        name: str = "",
        category: str = "",
        notes: Mapping[str, Note] | None = None,
        flow: int = 0,
        last: bool = False,
    ) -> TrackEvent:
        """Encode an event, to be given to :meth:`put`.

        ``flow`` connects events that have the same, not 0, in the order of time; ``last`` ends it.
        """
        body = _number(_EVENT_TYPE, kind) + _number(_EVENT_TRACK, track)
        if name:
            body += _number(_EVENT_NAME, self._intern(NAME, name))
        if category:
            body += _number(_EVENT_CATEGORY, self._intern(CATEGORY, category))
        for key, value in (notes or {}).items():
            body += _message(_EVENT_NOTE, _number(_NOTE_NAME, self._intern(NOTE, key)) + _note(value))
        if flow:
            body += _fixed(_EVENT_LAST_FLOW if last else _EVENT_FLOW, flow)
        return _event(body)

    def put(self, ns: int, event: TrackEvent) -> None:
        """Write an event."""
        self._write(b"".join((event.head, self._time(ns), event.tail)))

    def put_both(self, ns: int, event: TrackEvent, next: TrackEvent) -> None:
        """Write two events of the same time, as where one slice ends and another begins."""
        time = self._time(ns)
        self._write(b"".join((event.head, time, event.tail, next.head, time, next.tail)))

    def count(self, ns: int, track: int, value: int) -> None:
        """Write the value of a counter from ``ns`` on."""
        body = _number(_EVENT_TYPE, COUNT) + _number(_EVENT_TRACK, track) + _number(_EVENT_COUNT, value)
        self.put(ns, _event(body))

    def _time(self, ns: int) -> bytes:
        """Encode a time. This is the most frequent operation, so the rest of a packet is encoded only once."""
        # Times of one trace have their upper bits in common for two milliseconds each.
        if ns >> 21 != self._upper:
            self._upper, self._upper_bytes = ns >> 21, _long_varint(ns >> 21, _TIME_BYTES - 3)
        return bytes((ns & 0x7F | 0x80, ns >> 7 & 0x7F | 0x80, ns >> 14 & 0x7F | 0x80)) + self._upper_bytes

    def _intern(self, table: int, text: str) -> int:
        number = self._known.get((table, text))
        if number is None:
            number = self._known[table, text] = len(self._known) + 1
            entry = _number(_INTERNED_ID, number) + _text(_INTERNED_NAME, text)
            self._packet(_number(_PACKET_FLAGS, _NEEDED) + _message(_PACKET_INTERNED, _message(table, entry)))
        return number

    def _packet(self, body: bytes) -> None:
        self._write(_message(_TRACE_PACKET, _number(_PACKET_SEQUENCE, _SEQUENCE) + body))


# -- protobuf's wire format


def _varint(value: int) -> bytes:
    """Encode an integer of 64 bits, a negative one as its complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _long_varint(value: int, size: int) -> bytes:
    """Encode an integer of at most 7 * ``size`` bits in ``size`` bytes, some of which it would not need."""
    return bytes(value >> 7 * at & 0x7F | (0x80 if at < size - 1 else 0) for at in range(size))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _fixed(field: int, value: int) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<Q", value)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode(errors="replace"))


def _note(value: Note) -> bytes:
    match value:
        case bool():
            return _number(_NOTE_BOOL, value)
        case Pointer():
            return _number(_NOTE_POINTER, value)
        case int():
            return _number(_NOTE_INT, value)
        case str():
            return _text(_NOTE_TEXT, value)


_TIME_BYTES: Final = 10


def _event(body: bytes) -> TrackEvent:
    """Make a TrackEvent's packet, without its time."""
    tail = _number(_PACKET_SEQUENCE, _SEQUENCE) + _number(_PACKET_FLAGS, _NEEDED) + _message(_PACKET_EVENT, body)
    tag = _varint(_PACKET_TIME << 3)
    return TrackEvent(_varint(_TRACE_PACKET << 3 | 2) + _varint(len(tag) + _TIME_BYTES + len(tail)) + tag, tail)
