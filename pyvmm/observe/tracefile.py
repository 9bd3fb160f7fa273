# SPDX-License-Identifier: Apache-2.0
"""Convert the records of a :class:`~pyvmm.observe.recorder.Recorder` to a Perfetto trace, with these tracks:

    process: the VM                     exits/s, private pages, shared pages
      vCPU 0, 1, ...   [guest        ][exit: MMIO pl011+0x0][guest            ][exit: hypercall      ][guest ...
                         ! fault                                                 ! share ─────┐
      share relay                                                                   [announce ┴]
      device echo                                                                    [told    ]

A slice "guest" is from entering KVM_RUN to its return, including EL2, the host kernel and waiting. A slice "exit" is
from there to the next entry, in C, or in Python if the category says so. Owns nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyvmm._native import lib
from pyvmm.memory.relay import ShareSource
from pyvmm.observe.perfetto import BEGIN, END, INSTANT, Note, Pointer, TrackEvent, Writer
from pyvmm.observe.recorder import MOST_RECORDS
from pyvmm.observe.timeline import Record
from pyvmm.pages import HOST_PAGE
from pyvmm.vcpu.counters import EXITS

if TYPE_CHECKING:
    from pyvmm.kvm.faulttrace import TracedFault
    from pyvmm.observe.hyptrace import HypEvent
    from pyvmm.observe.recorder import Heard, Recorder

GUEST_IS: Final = "guest: from entering KVM_RUN to its return, with what EL2 and the host kernel do, and waiting"
BINS: Final = 1000
"""Values of exits/s at most, and no more than one a millisecond."""
MOST_NAMES: Final = 1 << 12
"""Maximum accesses named by their address, so that a guest cannot fill the table of names."""

_PROCESS, _EXITS, _DONATED, _PRIVATE, _SHARED, _RELAY, _MEMORY, _STRAY = range(1, 9)
_DEVICES, _EL2, _VCPUS = 1 << 8, 1 << 16, 1 << 17
_SOURCES: Final = {int(source): source.name.lower() for source in ShareSource}
_MMIO: Final = range(lib.PV_EXIT_MMIO_COLD, lib.PV_EXIT_MMIO_UNCLAIMED + 1)
_WORDS: Final = {
    lib.PV_EXIT_SYSTEM: "system event",
    lib.PV_EXIT_INTR: "interrupted",
    lib.PV_EXIT_FAILED: "KVM_RUN failed",
}


@dataclass(frozen=True, slots=True)
class TracedRun:
    """What the trace is of: its name, labels for the process, devices as (name, first gpa, size).

    ``protected``: a share takes a page from the private ones. ``donated``: the kernel tells how many those really are.
    """

    name: str
    labels: tuple[str, ...] = ()
    devices: tuple[tuple[str, int, int], ...] = ()
    protected: bool = False
    donated: bool = False
    start_ns: int = 0
    end_ns: int = 0


def write_trace(
    write: Callable[[bytes], object], recorder: Recorder, run: TracedRun, el2: Sequence[HypEvent] = ()
) -> list[str]:
    """Write the trace of a finished run through ``write``, which may raise anything. Returns what is missing.

    ``el2`` are the hypervisor's entries and exits, the oldest first; those before the run are left out.
    """
    trace = _Trace(Writer(write), recorder, run)
    trace.write(el2)
    return trace.notes()


class _Flows:
    """Connect related events: those about one page, from one conversion to the next.

    A conversion's flow contains the vCPU's record, the relay's announcement, and the notified or asking devices, in the
    order of time.
    """

    def __init__(self) -> None:
        self._current: dict[int, tuple[bool, bool, list[int]]] = {}
        self._members: list[list[int]] = []
        self.of: dict[int, tuple[int, bool]] = {}
        """(flow, whether it ends here) of an event, by id() of its Record or Heard."""

    def add(self, item: Record | Heard, page: int, shared: bool, is_record: bool) -> None:
        """Join the flow of ``page``; items come in the order of time."""
        known = self._current.get(page)
        if known is None or known[0] != shared or (is_record and known[1]):
            known = (shared, is_record, [])
            self._members.append(known[2])
        elif is_record:
            known = (shared, True, known[2])
        self._current[page] = known
        known[2].append(id(item))

    def settle(self) -> None:
        """Number the flows that have a beginning and an end."""
        for number, members in enumerate((m for m in self._members if len(m) > 1), 1):
            for member in members:
                self.of[member] = (number, member == members[-1])


@dataclass
class _Trace:
    writer: Writer
    recorder: Recorder
    run: TracedRun
    flows: _Flows = field(default_factory=_Flows)
    exits: dict[int, int] = field(default_factory=dict)
    names: dict[tuple[int, int, int], TrackEvent] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def write(self, el2: Sequence[HypEvent]) -> None:
        writer, recorder = self.writer, self.recorder
        heard = recorder.heard
        conversions = [self._conversions(index) for index in range(recorder.cpus)]
        self._connect([record for records in conversions for record in records], heard)
        self._describe(heard)
        faults = self._by_vcpu(recorder.faults())
        for index in range(recorder.cpus):
            self._vcpu(index, iter(conversions[index]), faults.pop(index, []))
        self._heard(heard)
        for fault in faults.pop(-1, []):
            writer.put(fault.ns, self._fault(fault, _STRAY))
        for change in recorder.changes():
            notes: dict[str, Note] = {"gpa": Pointer(change.gpa), "pages": change.pages}
            writer.put(change.ns, writer.event(INSTANT, _MEMORY, change.kind, "memory", notes))
        self._counters([record for records in conversions for record in records])
        self._el2(el2)

    # -- what there is

    def _describe(self, heard: Sequence[Heard]) -> None:
        run, writer, pid = self.run, self.writer, os.getpid()
        labels = [*run.labels, *self.notes()]
        writer.process(_PROCESS, pid, run.name, labels)
        writer.counter(_EXITS, _PROCESS, "exits/s", "exits/s", 1)
        if run.donated:
            writer.counter(_DONATED, _PROCESS, "donated pages", "pages", 2)
        writer.counter(_PRIVATE, _PROCESS, "private pages, assumed" if run.donated else "private pages", "pages", 3)
        writer.counter(_SHARED, _PROCESS, "shared pages", "pages", 4)
        tids = self.recorder.tids
        for index in range(self.recorder.cpus):
            # A vCPU whose thread was never seen has a number that no thread has.
            tid = tids.get(index, (1 << 31) - 1 - index)
            writer.thread(_VCPUS + index, _PROCESS, pid, tid, f"vCPU {index}", GUEST_IS)
        writer.track(_RELAY, _PROCESS, "share relay", 5)
        self.devices = {who: _DEVICES + n for n, who in enumerate(dict.fromkeys(h.who for h in heard if h.who))}
        for rank, (who, track) in enumerate(self.devices.items(), 6):
            writer.track(track, _PROCESS, f"device {who}", rank)
        writer.track(_MEMORY, _PROCESS, "memory, from the VMM's side", 1 << 10)
        writer.track(_STRAY, _PROCESS, "faults of some vCPU", (1 << 10) + 1)
        for note in self.notes():
            writer.put(run.start_ns, writer.event(INSTANT, _PROCESS, note, "lost"))

    def notes(self) -> list[str]:
        """Say what is not in the trace."""
        recorder = self.recorder
        notes = []
        if recorder.lost_in_rings:
            notes.append(f"{recorder.lost_in_rings:,} records found no room in a ring")
        if recorder.left:
            notes.append(f"{recorder.left:,} records came after the {MOST_RECORDS:,} that are kept")
        return notes

    def _conversions(self, index: int) -> list[Record]:
        kinds = (lib.PV_REC_SHARE, lib.PV_REC_UNSHARE)
        return [Record._make(record) for record in self.recorder.records(index) if record[1] in kinds]

    def _connect(self, records: Iterable[Record], heard: Iterable[Heard]) -> None:
        done = [(record.ns, 0, record) for record in records if record.value == 0]
        events: list[tuple[int, int, Record | Heard]] = [*done, *((h.ns, 1, h) for h in heard)]
        for _, _, item in sorted(events, key=lambda event: event[:2]):
            if isinstance(item, Record):
                self.flows.add(item, item.addr & -HOST_PAGE, item.kind == lib.PV_REC_SHARE, True)
            elif item.what != "asked" or item.shared:
                self.flows.add(item, item.gpa & -HOST_PAGE, item.shared, False)
        self.flows.settle()

    def _by_vcpu(self, faults: Sequence[TracedFault]) -> dict[int, list[TracedFault]]:
        """Group faults by vCPU, -1 for threads of unknown vCPUs."""
        cpus = {tid: index for index, tid in self.recorder.tids.items()}
        if self.recorder.cpus == 1:
            cpus.update((fault.tid, 0) for fault in faults)
        found: dict[int, list[TracedFault]] = {}
        for fault in faults:
            found.setdefault(cpus.get(fault.tid, -1), []).append(fault)
        return found

    # -- a vCPU

    def _vcpu(self, index: int, conversions: Iterator[Record], faults: Sequence[TracedFault]) -> None:
        writer, track = self.writer, _VCPUS + index
        put, put_both, names, exits = writer.put, writer.put_both, self.names, self.exits
        guest, end = writer.event(BEGIN, track, "guest", "guest"), writer.event(END, track)
        inside: list[Record] = []
        """Records of what the open exit slice did, and the next one's."""
        open_ns, last_fault, lost = -1, 0, False
        for record in self.recorder.records(index):
            ns, kind, missing, code, _, size, addr, guest_ns = record
            lost = lost or bool(missing)
            if kind != lib.PV_REC_EXIT:
                inside.append(Record._make(record) if kind == lib.PV_REC_FAULT else next(conversions))
                continue
            entered = ns - guest_ns
            if open_ns >= 0 and inside:
                inside = self._inside(track, open_ns if lost else entered, inside)
            if open_ns >= 0 and not lost:
                put_both(entered, end, guest)
            else:
                if open_ns >= 0:
                    # Nobody knows when that exit was over.
                    put_both(open_ns, end, writer.event(INSTANT, track, "records lost", "lost"))
                put(entered, guest)
            lost = False
            while last_fault < len(faults) and faults[last_fault].ns <= ns:
                # Their times are cut to microseconds.
                put(max(entered, faults[last_fault].ns), self._fault(faults[last_fault], track))
                last_fault += 1
            event = names.get((index << 8 | code, addr, size))
            if event is None:
                if len(names) >= MOST_NAMES:
                    names.clear()
                event = names[index << 8 | code, addr, size] = self._exit(Record._make(record), track)
            put_both(ns, end, event)
            open_ns = ns
            exits[ns >> 20] = exits.get(ns >> 20, 0) + 1
        if open_ns >= 0:
            over = max(open_ns, self.run.end_ns)
            self._inside(track, over, inside)
            put(over, end)

    def _inside(self, track: int, end: int, records: list[Record]) -> list[Record]:
        """Put records into the exit slice that is over at ``end``; returns those that came later."""
        later = []
        for record in records:
            if record.ns <= end:
                self.writer.put(record.ns, self._instant(record, track))
            else:
                later.append(record)
        return later

    def _exit(self, record: Record, track: int) -> TrackEvent:
        code = record.code
        if code not in _MMIO:
            return self.writer.event(BEGIN, track, f"exit: {_WORDS.get(code, EXITS.get(code, '?'))}", "exit")
        device = next((d for d in self.run.devices if 0 <= record.addr - d[1] < d[2]), None)
        name = f"exit: MMIO {device[0]}+{record.addr - device[1]:#x}" if device else "exit: MMIO, no device"
        if device and name not in self.seen:
            if len(self.seen) < MOST_NAMES:
                self.seen.add(name)
            else:
                name = f"exit: MMIO {device[0]}"
        notes: dict[str, Note] = {
            "gpa": Pointer(record.addr),
            "size": record.size & 0x7FFF_FFFF,
            "write": bool(record.size >> 31),
            "class": EXITS[code],
        }
        category = "exit,python" if code in (lib.PV_EXIT_MMIO_COLD, lib.PV_EXIT_MMIO_UNCLAIMED) else "exit"
        return self.writer.event(BEGIN, track, name, category, notes)

    def _instant(self, record: Record, track: int) -> TrackEvent:
        notes: dict[str, Note] = {"gpa": Pointer(record.addr)}
        if record.kind == lib.PV_REC_FAULT:
            notes |= {"errno": record.code, "size": record.size}
            return self.writer.event(INSTANT, track, "KVM_RUN failed", "fault", notes)
        name = "share" if record.kind == lib.PV_REC_SHARE else "unshare"
        status = record.value - (1 << 64) if record.value >> 63 else record.value
        source = _SOURCES.get(record.code, str(record.code))
        notes |= {"source": source, "status": status}
        flow, last = self.flows.of.get(id(record), (0, False))
        return self.writer.event(INSTANT, track, name if status == 0 else f"{name} refused", "share", notes, flow, last)

    def _fault(self, fault: TracedFault, track: int) -> TrackEvent:
        kind = "fault" if fault.write is None else "fetch" if fault.fetch else "write" if fault.write else "read"
        name = "fault" if kind == "fault" else f"fault: {kind}"
        return self.writer.event(INSTANT, track, name, "fault", {"gpa": Pointer(fault.gpa)})

    # -- the rest

    def _heard(self, heard: Sequence[Heard]) -> None:
        writer = self.writer
        for item in heard:
            flow, last = self.flows.of.get(id(item), (0, False))
            what = "share" if item.shared else "unshare"
            notes: dict[str, Note] = {"gpa": Pointer(item.gpa), "pages": item.npages}
            if item.what == "asked":
                name, track = f"asks: {'shared' if item.shared else 'not shared'}", self.devices[item.who]
                writer.put(item.ns, writer.event(INSTANT, track, name, "share", notes, flow, last))
                continue
            track = self.devices[item.who] if item.who else _RELAY
            name = f"hears of {what}" if item.who else f"announce {what}"
            writer.put(item.ns, writer.event(BEGIN, track, name, "share", notes, flow, last))
            writer.put(item.end_ns, writer.event(END, track))

    def _el2(self, events: Sequence[HypEvent]) -> None:
        writer = self.writer
        behind = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        cpus = {tid: index for index, tid in self.recorder.tids.items()}
        inside: dict[int, bool] = {}
        for event in events:
            ns, track = event.ns - behind, _EL2 + event.cpu
            if not self.run.start_ns <= ns <= self.run.end_ns or event.entered == inside.get(track, False):
                continue
            if track not in inside:
                writer.track(track, _PROCESS, f"EL2 on CPU {event.cpu}", (1 << 11) + event.cpu)
            inside[track] = event.entered
            if event.entered:
                notes: dict[str, Note] = {"vCPU": cpus[event.vcpu]} if event.vcpu in cpus else {}
                writer.put(ns, writer.event(BEGIN, track, f"EL2: {event.reason}", "el2", notes))
            else:
                writer.put(ns, writer.event(END, track))
        for track in (track for track, is_open in inside.items() if is_open):
            writer.put(self.run.end_ns, writer.event(END, track))

    def _counters(self, conversions: Sequence[Record]) -> None:
        writer, run = self.writer, self.run
        self._rate()
        # Between two looks at the pages the guest's own shares are what changes; the next look says what else did. A
        # move is recorded once it is done, so a look in its middle counts it already: no counter goes below zero.
        moves = sorted((r for r in conversions if r.value == 0), key=lambda record: record.ns)
        done = 0
        samples = self.recorder.samples
        for number, sample in enumerate(samples):
            private, shared = sample.private, sample.shared
            writer.count(sample.ns, _PRIVATE, private)
            writer.count(sample.ns, _SHARED, shared)
            if run.donated:
                writer.count(sample.ns, _DONATED, sample.donated)
            until = samples[number + 1].ns if number + 1 < len(samples) else sample.ns
            while done < len(moves) and moves[done].ns < until:
                move = moves[done]
                done += 1
                if move.ns < sample.ns:
                    continue
                step = 1 if move.kind == lib.PV_REC_SHARE else -1
                shared = max(shared + step, 0)
                writer.count(move.ns, _SHARED, shared)
                if run.protected:
                    private = max(private - step, 0)
                    writer.count(move.ns, _PRIVATE, private)

    def _rate(self) -> None:
        """Count exits in bins of 2^20 ns, or of a multiple, for at most BINS bins."""
        if not self.exits:
            return
        first, last = min(self.exits), max(self.exits)
        width = max(1, -(-(last - first + 1) // BINS))
        wide = [0] * -(-(last - first + 1) // width)
        for at, count in self.exits.items():
            wide[(at - first) // width] += count
        for number, count in enumerate([*wide, 0]):
            self.writer.count(first + number * width << 20, _EXITS, round(count * 1e9 / (width << 20)))
