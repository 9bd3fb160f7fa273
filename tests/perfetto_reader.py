# SPDX-License-Identifier: Apache-2.0
"""Reads the parts of a Perfetto trace that tests need: tracks, the events on them, flows.

Runs in the lab too, which has no protobuf. A unit test compares it with Perfetto's own classes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

Value = int | bytes


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Yield (number, value) of a message's fields."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                assert shift <= 70
                return value & (1 << 64) - 1

    while at < len(data):
        tag = varint()
        match tag & 7:
            case 0:
                yield tag >> 3, varint()
            case 1:
                at += 8
                yield tag >> 3, struct.unpack("<Q", data[at - 8 : at])[0]
            case 2:
                size = varint()
                at += size
                assert at <= len(data)
                yield tag >> 3, data[at - size : at]
            case wire:
                raise ValueError(f"wire type {wire}")


def message(data: Value) -> dict[int, list[Value]]:
    """Return the fields of a message by number."""
    assert isinstance(data, bytes)
    found: dict[int, list[Value]] = {}
    for number, value in fields(data):
        found.setdefault(number, []).append(value)
    return found


def text(value: Value) -> str:
    assert isinstance(value, bytes)
    return value.decode()


def number(value: Value) -> int:
    assert isinstance(value, int)
    return value


@dataclass
class Happening:
    """A slice (``end`` is its last ns), an instant (``end`` is ``ns``) or a counter's value."""

    ns: int
    name: str
    category: str
    notes: dict[str, int | str | bool]
    flows: list[int]
    last: bool
    depth: int = 0
    end: int = 0
    value: int | None = None


@dataclass
class Track:
    name: str
    parent: int
    slices: list[Happening] = field(default_factory=list)
    instants: list[Happening] = field(default_factory=list)
    values: list[Happening] = field(default_factory=list)


class Trace:
    """A whole trace. Raises AssertionError if slices do not nest or a reference precedes its description."""

    def __init__(self, data: bytes) -> None:
        self.tracks: dict[int, Track] = {}
        self.labels: list[str] = []
        events: list[tuple[int, int, int, Happening]] = []
        names: dict[tuple[int, int], str] = {}
        for place, packet in enumerate(fields(data)):
            assert packet[0] == 1
            parts = message(packet[1])
            assert parts[10] == [1]
            for interned in map(message, parts.get(12, [])):
                for table, entries in interned.items():
                    for entry in map(message, entries):
                        assert (table, number(entry[1][0])) not in names
                        names[table, number(entry[1][0])] = text(entry[2][0])
            for track in map(message, parts.get(60, [])):
                self._describe(track)
            for event in map(message, parts.get(11, [])):
                assert number(event[11][0]) in self.tracks
                events.append((number(parts[8][0]), place, number(event[11][0]), self._happening(event, names)))
                events[-1][3].ns = events[-1][0]
                events[-1][3].depth = number(event[9][0])
        self._nest(sorted(events, key=lambda event: event[:2]))

    def _describe(self, track: dict[int, list[Value]]) -> None:
        name = text(track[2][0]) if 2 in track else ""
        if 3 in track:
            process = message(track[3][0])
            name, self.labels = text(process[6][0]), [text(label) for label in process.get(8, [])]
        if 4 in track:
            name = text(message(track[4][0])[5][0])
        parent = number(track[5][0]) if 5 in track else 0
        assert not parent or parent in self.tracks
        self.tracks[number(track[1][0])] = Track(name, parent)

    @staticmethod
    def _happening(event: dict[int, list[Value]], names: dict[tuple[int, int], str]) -> Happening:
        notes: dict[str, int | str | bool] = {}
        for note in map(message, event.get(4, [])):
            key = names[3, number(note[1][0])]
            if 2 in note:
                notes[key] = bool(note[2][0])
            elif 6 in note:
                notes[key] = text(note[6][0])
            else:
                value = number((note.get(4) or note[7])[0])
                notes[key] = value - (1 << 64) if 4 in note and value >> 63 else value
        name = names[2, number(event[10][0])] if 10 in event else ""
        category = names[1, number(event[3][0])] if 3 in event else ""
        flows = [number(flow) for flow in (*event.get(47, []), *event.get(48, []))]
        counted = number(event[30][0]) if 30 in event else None
        return Happening(0, name, category, notes, flows, 48 in event, value=counted)

    def _nest(self, events: list[tuple[int, int, int, Happening]]) -> None:
        begin, end, instant, count = 1, 2, 3, 4
        open_: dict[int, list[Happening]] = {}
        for ns, _, uuid, happening in events:
            track, kind, stack = self.tracks[uuid], happening.depth, open_.setdefault(uuid, [])
            happening.depth = len(stack)
            match kind:
                case _ if kind == begin:
                    stack.append(happening)
                    track.slices.append(happening)
                case _ if kind == end:
                    stack.pop().end = ns
                case _ if kind == instant:
                    happening.end = ns
                    track.instants.append(happening)
                case _:
                    assert kind == count
                    track.values.append(happening)
        assert not any(open_.values())

    def track(self, name: str) -> Track:
        """Return the only track of this name."""
        (found,) = (track for track in self.tracks.values() if track.name == name)
        return found

    def flows(self) -> dict[int, list[tuple[str, str]]]:
        """Return (track, name) of the members of each flow, in order of time."""
        found: dict[int, list[tuple[int, str, str]]] = {}
        for track in self.tracks.values():
            for happening in (*track.slices, *track.instants):
                for flow in happening.flows:
                    found.setdefault(flow, []).append((happening.ns, track.name, happening.name))
        return {flow: [member[1:] for member in sorted(members)] for flow, members in found.items()}
