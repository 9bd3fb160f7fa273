# SPDX-License-Identifier: Apache-2.0
"""A trace: the records of a run, their tracks, and Perfetto's format."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm import abi
from pyvmm._native import ffi, lib
from pyvmm.devices.echo import Echo
from pyvmm.kvm.faulttrace import TracedFault
from pyvmm.memory.address import Gpa
from pyvmm.memory.relay import ShareEvent, ShareRelay, ShareSource
from pyvmm.observe import perfetto, recorder
from pyvmm.observe.hyptrace import HypEvent
from pyvmm.observe.recorder import Recorder
from pyvmm.observe.timeline import Event
from pyvmm.observe.tracefile import TracedRun, write_trace
from pyvmm.protection import Protection
from tests.memory_helper import BASE, build
from tests.perfetto_reader import Trace

UART, PAGE = 0x0900_0000, 0x8010_0000
WRITE = 1 << 31


class Vcpus:
    """Fake vCPUs that have only rings, and a running recorder for them."""

    def __init__(self, count: int = 1, faults: Any = None) -> None:
        self.vm = ffi.new("struct pv_vm *")
        self.natives = [ffi.new("struct pv_vcpu *", {"index": n, "vm": self.vm, "tid": 100 + n}) for n in range(count)]
        self.recorder = Recorder(faults)
        self.recorder.watch(SimpleNamespace(), self.natives)  # type: ignore[arg-type]

    def put(self, ns: int, kind: int, *, cpu: int = 0, guest: int = 0, lost: int = 0, **more: int) -> None:
        ring = self.natives[cpu].ring
        record = ring.records[ring.head & (ring.size - 1)]
        for name, value in {"code": 0, "addr": 0, "size": 0, "value": guest, **more}.items():
            setattr(record, name, value & (1 << 64) - 1)
        record.ns, record.kind, record.lost = ns, kind, lost
        ring.head += 1

    def exit(self, ns: int, guest: int, code: int = lib.PV_EXIT_MMIO_PL011, addr: int = UART, **more: int) -> None:
        self.put(ns, lib.PV_REC_EXIT, guest=guest, code=code, addr=addr, size=4 | WRITE, **more)

    def trace(self, *, el2: tuple[HypEvent, ...] = (), **about: Any) -> Trace:
        self.recorder.stop()
        written: list[bytes] = []
        what = TracedRun("a run", devices=(("pl011", UART, 0x1000),), **{"start_ns": 0, "end_ns": 10_000, **about})
        self.notes = write_trace(written.append, self.recorder, what, el2)
        return Trace(b"".join(written))


def spans(track: Any) -> list[tuple[str, int, int]]:
    return [(slice_.name, slice_.ns, slice_.end) for slice_ in track.slices]


def test_guest_and_exit_slices_take_turns_without_a_gap() -> None:
    vcpus = Vcpus()
    vcpus.exit(1000, 400)
    vcpus.exit(1500, 300, lib.PV_EXIT_HYPERCALL, 0)
    trace = vcpus.trace(end_ns=1700)
    track = trace.track("vCPU 0")
    assert spans(track) == [
        ("guest", 600, 1000),
        ("exit: MMIO pl011+0x0", 1000, 1200),
        ("guest", 1200, 1500),
        ("exit: hypercall", 1500, 1700),
    ]
    assert track.slices[1].notes == {"gpa": UART, "size": 4, "write": True, "class": "uart"}
    assert track.slices[1].depth == 0
    assert sum(value.value or 0 for value in trace.track("exits/s").values) > 0


def test_the_action_of_an_exit_is_in_its_slice_and_a_fault_in_the_guests_slice() -> None:
    class Faults:
        why_not, lost, collect = "", 0, list

        @staticmethod
        def faults() -> list[TracedFault]:
            return [TracedFault(1250, BASE, True, False, 100), TracedFault(1300, BASE, None, None, 7)]

    vcpus = Vcpus(2, Faults())
    vcpus.put(1010, lib.PV_REC_SHARE, addr=PAGE, code=lib.PV_SOURCE_DOORBELL)
    vcpus.exit(1000, 400, lib.PV_EXIT_MMIO_SHARE)
    vcpus.put(1100, lib.PV_REC_UNSHARE, addr=PAGE, value=-3)
    vcpus.put(1600, lib.PV_REC_FAULT, code=14, addr=PAGE, size=4096)
    vcpus.exit(1500, 300, lib.PV_EXIT_FAILED)
    trace = vcpus.trace()
    inside = [(i.ns, i.name, i.depth, i.notes["gpa"]) for i in trace.track("vCPU 0").instants]
    assert inside == [
        (1010, "share", 1, PAGE),
        (1100, "unshare refused", 1, PAGE),
        (1250, "fault: write", 1, BASE),
        (1600, "KVM_RUN failed", 1, PAGE),
    ]
    assert trace.track("vCPU 0").instants[1].notes["status"] == -3
    assert [i.name for i in trace.track("faults of some vCPU").instants] == ["fault"]


def test_no_slice_covers_a_gap_of_missing_records() -> None:
    vcpus = Vcpus()
    vcpus.exit(1000, 100)
    vcpus.exit(9000, 100, lost=1)
    vcpus.natives[0].ring.dropped = 5
    trace = vcpus.trace()
    track = trace.track("vCPU 0")
    assert spans(track)[1:3] == [("exit: MMIO pl011+0x0", 1000, 1000), ("guest", 8900, 9000)]
    assert [(i.ns, i.name) for i in track.instants] == [(1000, "records lost")]
    assert vcpus.notes == ["5 records found no room in a ring"]
    assert set(vcpus.notes) <= set(trace.labels)


RECORDS = st.lists(
    st.tuples(st.sampled_from(["exit", "share", "unshare", "fault"]), *[st.integers(0, 50)] * 3, st.booleans()),
    max_size=30,
)


@settings(max_examples=60)
@given(RECORDS, st.lists(st.integers(0, 3000), max_size=5))
def test_slices_nest_whatever_was_recorded(records: list[Any], faults: list[int]) -> None:
    told = SimpleNamespace(
        why_not="", lost=0, collect=list, faults=lambda: [TracedFault(n, 0, True, False) for n in faults]
    )
    vcpus, ns, exits = Vcpus(faults=told), 0, 0
    faults.sort()
    for kind, before, guest, code, lost in records:
        ns += before
        if kind == "exit":
            ns += guest
            exits += 1
            vcpus.exit(ns, guest, code % lib.PV_EXITS, code, lost=int(lost))
        else:
            which = {"share": lib.PV_REC_SHARE, "unshare": lib.PV_REC_UNSHARE, "fault": lib.PV_REC_FAULT}[kind]
            vcpus.put(ns, which, addr=code << 12, value=-(code % 3), lost=int(lost), code=1)
    track = vcpus.trace(end_ns=ns).track("vCPU 0")
    assert [slice_.depth for slice_ in track.slices] == [0] * 2 * exits
    for one, next_ in itertools.pairwise(spans(track)):
        assert one[1] <= one[2] <= next_[1]


def test_flows_link_a_share_to_the_devices_access_and_an_unshare_to_the_relay() -> None:
    vcpus = Vcpus()
    _, memory, _ = build(Protection.EMULATED)
    with memory:
        relay = ShareRelay(memory.native, memory.ledger)
        vcpus.recorder.listen(relay)
        echo = Echo(memory, relay)
        page, now = Gpa(BASE + 0x4000), time.monotonic_ns
        start = now()
        echo.write(abi.ECHO_PAGE, 8, page, 0)
        assert echo.status == abi.ECHO_NOT_SHARED
        lib.pv_ledger_set(memory.native, page, lib.PV_PAGE_SHARED)
        vcpus.put(now(), lib.PV_REC_SHARE, addr=page, code=1)
        echo.write(abi.ECHO_PAGE, 8, page, 0)
        assert echo.page == page
        # For an emulated guest the relay hears before the page is closed and recorded.
        relay.deliver(ShareEvent(False, page, 1, ShareSource.HYPERCALL, now()))
        vcpus.put(now(), lib.PV_REC_UNSHARE, addr=page, code=2)
        assert echo.page == 0
        echo.close()
    vcpus.exit(now(), 1, lib.PV_EXIT_HYPERCALL)
    trace = vcpus.trace(start_ns=start, end_ns=now())
    assert list(trace.flows().values()) == [
        [("vCPU 0", "share"), ("device echo", "asks: shared")],
        [("share relay", "announce unshare"), ("device echo", "hears of unshare"), ("vCPU 0", "unshare")],
    ]
    asked = trace.track("device echo").instants
    assert [(i.name, i.notes["gpa"], i.last) for i in asked] == [
        ("asks: not shared", page, False),
        ("asks: shared", page, True),
    ]


def test_each_cpu_has_a_track_for_el2_from_the_start_to_the_end_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "clock_gettime_ns", lambda _clock: time.monotonic_ns())
    vcpus = Vcpus()
    start = time.monotonic_ns()
    vcpus.exit(start + 10_000_000, 100)
    ms = [start + n * 1_000_000 for n in range(12)]
    events = [
        (ms[0] - 50_000_000, 0, True),
        (ms[1], 0, False),
        (ms[2], 0, True),
        (ms[3], 1, True),
        (ms[4], 0, False),
        (ms[5], 1, True),
        (ms[6], 0, True),
    ]
    trace = vcpus.trace(
        el2=tuple(HypEvent(ns, cpu, entered, "hvc", 100) for ns, cpu, entered in events), start_ns=start, end_ns=ms[8]
    )
    zero, one = (trace.track(f"EL2 on CPU {cpu}").slices for cpu in (0, 1))
    assert [(s.name, round((s.end - s.ns) / 1e6)) for s in zero] == [("EL2: hvc", 2), ("EL2: hvc", 2)]
    assert [(s.name, round((s.end - s.ns) / 1e6)) for s in one] == [("EL2: hvc", 5)]
    assert zero[0].notes == {"vCPU": 0}


def test_page_counters_follow_the_guests_shares_between_two_samples() -> None:
    vcpus = Vcpus()
    vcpus.vm.pages[lib.PV_PAGE_PRIVATE] = 10
    vcpus.recorder.collect()
    first = time.monotonic_ns()
    vcpus.put(first + 1, lib.PV_REC_SHARE, addr=PAGE)
    vcpus.put(first + 2, lib.PV_REC_SHARE, addr=PAGE, value=-1)
    vcpus.put(first + 3, lib.PV_REC_UNSHARE, addr=PAGE)
    trace = vcpus.trace(protected=True)
    shared = [value.value for value in trace.track("shared pages").values if first < value.ns <= first + 3]
    private = [value.value for value in trace.track("private pages").values if first < value.ns <= first + 3]
    assert (shared, private) == ([1, 0], [9, 10])


def test_page_counters_stay_above_zero_if_a_sample_precedes_the_record_of_a_move() -> None:
    vcpus = Vcpus()
    vcpus.recorder.collect()
    first = time.monotonic_ns()
    for at, kind in enumerate((lib.PV_REC_UNSHARE, lib.PV_REC_SHARE, lib.PV_REC_SHARE, lib.PV_REC_UNSHARE), start=1):
        vcpus.put(first + at, kind, addr=PAGE)
    trace = vcpus.trace(protected=True)
    shared = [value.value for value in trace.track("shared pages").values if first < value.ns <= first + 4]
    private = [value.value for value in trace.track("private pages").values if first < value.ns <= first + 4]
    assert (shared, private) == ([0, 1, 2, 1], [1, 0, 0, 1])


# -- the recorder


def test_recording_keeps_the_first_exits_and_counts_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MOST_RECORDS", 3)
    vcpus = Vcpus()
    assert (vcpus.natives[0].ring.exits, vcpus.natives[0].ring.size) == (1, recorder.RING_RECORDS)
    for ns in range(100, 600, 100):
        vcpus.exit(ns, 10)
    vcpus.recorder.stop()
    vcpus.recorder.stop()
    assert [record[0] for record in vcpus.recorder.records(0)] == [100, 200, 300]
    assert (vcpus.recorder.left, vcpus.recorder.lost) == (2, 2)


def test_a_recorder_gives_the_map_its_timeline() -> None:
    vcpus = Vcpus(2)
    vcpus.exit(50, 1)
    vcpus.put(100, lib.PV_REC_SHARE, addr=PAGE, cpu=1)
    vcpus.put(90, lib.PV_REC_UNSHARE, addr=PAGE + 4096)
    assert vcpus.recorder.events() == (Event(90, "unshare", PAGE + 4096), Event(100, "share", PAGE))
    vcpus.put(110, lib.PV_REC_UNSHARE, addr=PAGE, cpu=1)
    assert [event.ns for event in vcpus.recorder.events()] == [90, 100, 110]
    vcpus.recorder.stop()


# -- the format


NOTES = st.dictionaries(
    st.text(max_size=5),
    st.one_of(
        st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1), st.text(max_size=200),
        st.integers(0, (1 << 64) - 1).map(perfetto.Pointer),
    ),
    max_size=3,
)  # fmt: skip


@given(st.integers(0, (1 << 64) - 1), st.text(min_size=1, max_size=300), NOTES, st.integers(1, (1 << 64) - 1))
def test_perfettos_own_classes_read_the_trace(ns: int, name: str, notes: dict[str, Any], flow: int) -> None:
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto  # type: ignore[import-untyped]  # no stubs

    written: list[bytes] = []
    writer = perfetto.Writer(written.append)
    writer.process(1, 42, name, ["a label"])
    writer.thread(2, 1, 42, 43, "vCPU 0", "what it is")
    writer.counter(3, 1, "pages", "pages", 7)
    writer.put(ns, writer.event(perfetto.BEGIN, 2, name, "kind", notes, flow))
    writer.put_both(ns, writer.event(perfetto.END, 2), writer.event(perfetto.INSTANT, 2, name, flow=flow, last=True))
    writer.count(ns, 3, -5)
    data = b"".join(written)
    read = proto.Trace.FromString(data)
    names = {entry.iid: entry.name for packet in read.packet for entry in packet.interned_data.event_names}
    keys = {entry.iid: entry.name for packet in read.packet for entry in packet.interned_data.debug_annotation_names}
    clocks = {clock.clock_id for clock in read.packet[0].clock_snapshot.clocks}
    assert (clocks, read.packet[0].clock_snapshot.primary_trace_clock) == ({1, 3, 6}, 3)
    assert read.packet[1].trace_packet_defaults.timestamp_clock_id == 3
    process, thread, counter = (p.track_descriptor for p in read.packet if p.HasField("track_descriptor"))
    assert (process.process.pid, process.process.process_name, list(process.process.process_labels)) == (
        42,
        name,
        ["a label"],
    )
    assert (thread.parent_uuid, thread.thread.tid, thread.thread.thread_name) == (1, 43, "vCPU 0")
    assert (counter.name, counter.counter.unit_name, counter.sibling_order_rank) == ("pages", "pages", 7)
    packets = [packet for packet in read.packet if packet.HasField("track_event")]
    assert {packet.timestamp for packet in packets} == {ns}
    begin, end, instant, count = (packet.track_event for packet in packets)
    kinds = proto.TrackEvent
    assert [event.type for event in (begin, end, instant, count)] == [
        kinds.TYPE_SLICE_BEGIN,
        kinds.TYPE_SLICE_END,
        kinds.TYPE_INSTANT,
        kinds.TYPE_COUNTER,
    ]
    assert names[begin.name_iid] == name
    assert (list(begin.flow_ids), list(instant.terminating_flow_ids), count.counter_value) == ([flow], [flow], -5)
    values = [getattr(note, note.WhichOneof("value")) for note in begin.debug_annotations]
    assert dict(zip((keys[n.name_iid] for n in begin.debug_annotations), values, strict=True)) == notes
    # The reader that the other tests use agrees.
    (slice_,) = Trace(data).track("vCPU 0").slices
    assert (slice_.name, slice_.ns, slice_.end, slice_.flows) == (name, ns, ns, [flow])
