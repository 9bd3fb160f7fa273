# SPDX-License-Identifier: Apache-2.0
"""The timeline: the recorded events of a run, and how they are drawn."""

from __future__ import annotations

import re
import threading
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._native import ffi, lib
from pyvmm.kvm.faulttrace import TracedFault
from pyvmm.memory.address import MIB
from pyvmm.memory.backing import Memfd
from pyvmm.observe import timeline, timesvg
from pyvmm.observe.timeline import KINDS, Event, Timeline
from pyvmm.observe.timesvg import svg_timeline
from pyvmm.protection import Protection
from tests.memory_helper import BASE, build

PAGE = 4096
SVG = "{http://www.w3.org/2000/svg}"


class Ring:
    """A fake vCPU that has only its ring."""

    def __init__(self, size: int = 8) -> None:
        self.records = ffi.new("struct pv_record[]", size)
        self.native: Any = ffi.new("struct pv_vcpu *")
        self.native.ring.size, self.native.ring.records = size, self.records

    def put(self, kind: int, ns: int, gpa: int, *, status: int = 0, size: int = PAGE) -> None:
        ring = self.native.ring
        record = self.records[ring.head & (ring.size - 1)]
        record.ns, record.kind, record.addr, record.size = ns, kind, gpa, size
        record.value = status & (1 << 64) - 1
        ring.head += 1


class Trace:
    """A fake FaultTrace with given faults."""

    def __init__(self, *faults: TracedFault, why_not: str = "", lost: int = 0) -> None:
        self.faults = lambda: list(faults)
        self.why_not, self.lost = why_not, lost
        self.collect = list


def test_shares_of_all_vcpus_are_in_order_without_refused_ones() -> None:
    first, second = Ring(), Ring()
    first.put(lib.PV_REC_SHARE, 20, BASE)
    first.put(lib.PV_REC_UNSHARE, 40, BASE)
    second.put(lib.PV_REC_SHARE, 30, BASE + PAGE)
    second.put(lib.PV_REC_SHARE, 35, 0x1234, status=-3)
    second.put(lib.PV_REC_EXIT, 36, 0x900_0000)
    second.put(lib.PV_REC_FAULT, 37, BASE, size=0)
    _, memory, _ = build(Protection.EMULATED)
    with memory:
        recorder = Timeline(Trace(TracedFault(10, BASE, True, False)))  # type: ignore[arg-type]
        recorder.watch(memory, [first.native, second.native])
        expected = (
            Event(10, "fault", BASE),
            Event(20, "share", BASE),
            Event(30, "share", BASE + PAGE),
            Event(40, "unshare", BASE),
        )
        assert recorder.events() == expected
        assert recorder.events() == expected
        first.put(lib.PV_REC_SHARE, 50, BASE)
        recorder.stop()
        first.put(lib.PV_REC_SHARE, 60, BASE)
        assert recorder.events() == (*expected, Event(50, "share", BASE))
        assert recorder.notes == []


def test_events_left_out_while_the_recorder_stops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST", 0)
    _, memory, _ = build(Protection.EMULATED)
    with memory:
        recorder = Timeline()
        recorder.watch(memory, [Ring().native])
        dropped = recorder._dropped
        others: list[threading.Thread] = []

        def while_another_changes_memory() -> int:
            if not others:
                others.append(threading.Thread(target=memory.punch, args=(BASE, PAGE)))
                others[0].start()
                others[0].join(0.2)
            return dropped()

        monkeypatch.setattr(recorder, "_dropped", while_another_changes_memory)
        recorder.stop()
        others[0].join(10)
        assert recorder.lost == 1


def test_changes_of_memory_by_the_host_are_recorded() -> None:
    _, memory, _ = build(Protection.EMULATED)
    with memory:
        recorder = Timeline()
        recorder.watch(memory, [])
        slot = memory.add(BASE + 2 * MIB, Memfd(MIB))
        memory.punch(BASE + PAGE, 2 * PAGE)
        memory.convert(BASE, shared=True)
        memory.convert(BASE, shared=True)  # refused: it exists already
        memory.remove(slot)
        assert [event[1:] for event in recorder.events()] == [
            ("slot", BASE + 2 * MIB, 256),
            ("punch", BASE + PAGE, 2),
            ("convert", BASE, 1),
            ("slot", BASE + 2 * MIB, 256),
        ]


def test_missing_events_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Timeline().notes == ["faults were not recorded: nobody asked for them"]
    ring = Ring()
    ring.native.ring.dropped = 3
    monkeypatch.setattr(timeline, "MOST", 2)
    for ns in range(4):
        ring.put(lib.PV_REC_SHARE, ns, BASE)
    ring.put(lib.PV_REC_FAULT, 9, BASE + 5)
    _, memory, _ = build()
    with memory:
        recorder = Timeline(Trace(why_not="no tracefs", lost=4))  # type: ignore[arg-type]
        recorder.watch(memory, [ring.native])
        assert [event.ns for event in recorder.events()] == [0, 1]
        assert recorder.lost == 3 + 3 + 4
        recorder.stop()
        assert recorder.notes == [
            "faults were not recorded: no tracefs",
            "10 events were lost: there was no room for them",
        ]


def test_a_failed_run_gives_its_address_if_the_kernel_traced_nothing() -> None:
    ring = Ring()
    ring.put(lib.PV_REC_FAULT, 9, BASE + 5)
    _, memory, _ = build()
    with memory:
        recorder = Timeline()
        recorder.watch(memory, [ring.native])
        assert recorder.events() == (Event(9, "fault", BASE),)


# -- the picture


def texts(picture: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(picture.encode()).iter(f"{SVG}text")]


ONE_OF_EACH = [Event(1_000_000 * index, kind, BASE + index * PAGE, 1) for index, kind in enumerate(KINDS)]


def test_each_kind_has_a_shape_a_colour_a_tooltip_and_a_count() -> None:
    picture = svg_timeline([*ONE_OF_EACH, ONE_OF_EACH[0]])
    said = texts(picture)
    assert [line for line in said if line.split()[0] in KINDS] == ["fault 2", *(f"{kind} 1" for kind in KINDS[1:])]
    assert f"<title>share 0x8000_1000 {1.0:.3f} ms</title>" in picture
    assert "<title>fault 0x8000_0000 0.000 ms, and 1 more here</title>" in picture
    marks = [timesvg._MARKS[kind] for kind in KINDS]
    assert len({mark.path for mark in marks}) == len({mark.paint for mark in marks}) == len(KINDS)
    assert "time in ms" in said


def test_addresses_without_events_are_left_out_and_the_gap_is_marked() -> None:
    events = [Event(1, "fault", BASE), Event(2, "fault", BASE + PAGE), Event(3, "share", 1 << 40)]
    said = texts(svg_timeline(events))
    assert "~ 1022 GiB where nothing happened ~" in said
    assert {"0x8000_0000", "0x100_0000_0000"} <= set(said)


def test_events_are_drawn_by_order_if_times_are_not_wanted() -> None:
    picture = svg_timeline([Event(index, "fault", BASE + index * PAGE) for index in range(20)], by_order=True)
    assert "events in their order; times are not drawn" in texts(picture)
    assert "<title>fault 0x8000_3000 3.</title>" in picture


def test_notes_are_drawn_and_escaped_and_an_empty_timeline_says_so() -> None:
    said = texts(svg_timeline([], "Nothing & <more>", notes=["faults were not recorded: <why>"]))
    assert said == ["Nothing & <more>", "nothing happened", "faults were not recorded: <why>"]


def test_inline_timelines_have_no_ids_and_no_header() -> None:
    picture = svg_timeline(ONE_OF_EACH, inline=True)
    assert picture.startswith("<svg ")
    assert "id=" not in picture
    assert "xmlns" not in picture
    assert len(picture) < 5000


def test_the_picture_of_thousands_of_faults_stays_small_without_tooltips() -> None:
    events = [Event(index * 7919, "fault", BASE + (index * 31 % 4096) * PAGE) for index in range(5000)]
    picture = svg_timeline(events)
    assert len(picture) < 120_000
    assert picture.count("<title>") == 1
    assert "fault 5,000" in texts(picture)


kinds = st.sampled_from([*KINDS, "odd"])
events = st.builds(
    Event, st.integers(0, 1 << 62), kinds, st.integers(0, 1 << 48).map(lambda n: n * PAGE), st.integers(1, 1 << 20)
)


@given(st.lists(events, max_size=30), st.none() | st.integers(0, 1 << 62), st.booleans())
def test_any_events_are_drawn_within_the_plot(found: list[Event], start: int | None, by_order: bool) -> None:
    picture = svg_timeline(found, start=start, by_order=by_order)
    root = ET.fromstring(picture.encode())
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert 0 < height < timesvg.HEIGHT + timesvg.RANGES * (timesvg.BAND + timesvg.GAP) + 200
    for x, y in re.findall(r'<path d="M([\d.]+) ([\d.]+)', picture):
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
    counted = sum(int(line.split()[1]) for line in texts(picture) if line.split()[0] in {*KINDS, "odd"})
    assert counted == len(found)
