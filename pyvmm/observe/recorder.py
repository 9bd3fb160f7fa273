# SPDX-License-Identifier: Apache-2.0
"""Record every exit of a run, and the guest's waits, for a trace file.

A :class:`Recorder` is a :class:`~pyvmm.observe.timeline.Timeline` that keeps the rings' raw records. It owns a thread
(``pyvmm-trace``) that empties the rings, larger rings for the vCPUs, and hooks in the share relay. The vCPUs only write
a record at each exit. Decoding and writing happen after the run.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pyvmm._native import ffi, lib
from pyvmm.observe.rates import donated
from pyvmm.observe.timeline import MOST, Event, Record, Timeline

if TYPE_CHECKING:
    from pyvmm._native import Array, pv_record, pv_vcpu
    from pyvmm.kvm.faulttrace import FaultTrace, TracedFault
    from pyvmm.memory.memory import Memory
    from pyvmm.memory.relay import ShareEvent, ShareRelay, Subscriber

MOST_RECORDS: Final = 1 << 20
"""Maximum records of a run, about one per exit. Later ones are counted as lost. 32 MiB, and ten times that as a
file."""
RING_RECORDS: Final = 1 << 16
"""Of a vCPU, fewer where there are many of them: at a million exits a second, 65 ms of one."""
_ALL_RINGS: Final = 1 << 19
PERIOD = 0.05
"""Pause between two looks at the rings: seconds, and multiples of the last look; none while a ring fills fast."""
PATIENCE = 5
_BATCH: Final = 1 << 12
_RECORD: Final = struct.Struct("<QBBBBIQQ")


class Sample(NamedTuple):
    """Pages of a machine at ``ns`` of CLOCK_MONOTONIC; ``donated`` is 0 but for a guest that pKVM protects."""

    ns: int
    private: int
    shared: int
    donated: int


@dataclass(frozen=True, slots=True)
class Heard:
    """An event of the share relay from ``ns`` to ``end_ns``, for the pages from ``gpa``.

    ``what`` is "announced" for the notification of all subscribers, "told" for that of the subscriber ``who``, and
    "asked" when ``who`` checked whether a page is shared. Then ``shared`` is the answer, else the conversion.
    """

    what: str
    who: str
    gpa: int
    npages: int
    shared: bool
    ns: int
    end_ns: int


class Recorder(Timeline):
    """Records one machine's run. ``trace`` provides faults, if available."""

    def __init__(self, trace: FaultTrace | None = None) -> None:
        super().__init__(trace)
        self._batch = ffi.new("struct pv_record[]", _BATCH)
        self._rings: list[Array[pv_record]] = []
        self._raw: list[list[bytes]] = []
        self._kept = self._left = self._lost_in_rings = 0
        self._decoded: list[int] = []
        self._tids: dict[int, int] = {}
        self._samples: list[Sample] = []
        self._heard: list[Heard] = []
        self._thread: threading.Thread | None = None
        self._wake = -1

    # -- the run

    def watch(self, memory: Memory, natives: Sequence[pv_vcpu]) -> None:
        """Make ``natives``, which have not run yet, record every exit, and start to collect the records."""
        super().watch(memory, natives)
        size = RING_RECORDS
        while size * len(natives) > _ALL_RINGS:
            size //= 2
        for native in natives:
            records = ffi.new("struct pv_record[]", size)
            # Its pages are there from now on: the vCPU must not fault for them.
            ffi.memmove(records, bytes(ffi.sizeof(records)), ffi.sizeof(records))
            self._rings.append(records)
            native.ring.records, native.ring.size, native.ring.exits = records, size, 1
        self._raw = [[] for _ in natives]
        self._decoded = [0] * len(natives)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._drain, name="pyvmm-trace", daemon=True)
        self._thread.start()

    def listen(self, relay: ShareRelay) -> None:
        """Record the events of ``relay`` from now on. Call it before any device subscribes."""
        # A subscriber would make the loop stop at every share, which would distort the trace. So the relay's methods
        # are wrapped, which run only at shares that stop the loop anyway.
        for name, stand_in in Ears(relay, self._hear).stand_ins().items():
            setattr(relay, name, stand_in)

    def stop(self) -> None:
        """Empty the rings for the last time, after the vCPUs have stopped. Idempotent."""
        if self._thread is None:
            return
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._thread = None
        os.close(self._wake)
        self._lost_in_rings = self._dropped()
        super().stop()

    def _hear(self, heard: Heard) -> None:
        with self._lock:
            if len(self._heard) < MOST:
                self._heard.append(heard)
            else:
                self._left_out += 1

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        pause = 0.0
        while not poll.poll(1000 * pause):
            began = time.monotonic()
            fullest = max(native.ring.head - native.ring.tail for native in self._natives)
            self.collect()
            hurry = 4 * fullest > self._natives[0].ring.size
            pause = 0.0 if hurry else max(PERIOD, PATIENCE * (time.monotonic() - began))

    def collect(self) -> None:
        """Take what is in the rings and in the kernel's buffer, and look at the pages."""
        with self._lock:
            for index, native in enumerate(self._natives):
                if native.tid:
                    self._tids[index] = native.tid
                while count := lib.pv_ring_read(ffi.addressof(native.ring), self._batch, _BATCH):
                    self._keep(index, count)
            if self._natives:
                vm = self._natives[0].vm
                pages = vm.pages
                known = donated() if vm.protection == lib.PV_PKVM else 0
                sample = Sample(time.monotonic_ns(), pages[lib.PV_PAGE_PRIVATE], pages[lib.PV_PAGE_SHARED], known)
                if len(self._samples) < MOST_RECORDS:
                    self._samples.append(sample)
        if self._trace is not None:
            self._trace.collect()

    def _keep(self, index: int, count: int) -> None:
        room = min(count, MOST_RECORDS - self._kept)
        if room:
            self._raw[index].append(bytes(ffi.buffer(self._batch, room * _RECORD.size)))
        self._kept += room
        self._left += count - room
        self._left_out += count - room

    # -- what was recorded

    @property
    def cpus(self) -> int:
        """How many vCPUs were recorded."""
        return len(self._raw)

    @property
    def lost_in_rings(self) -> int:
        """Records that found no room in a ring; one that came after some has ``lost`` set."""
        return self._lost_in_rings

    @property
    def kept(self) -> int:
        """Records there are."""
        return self._kept

    @property
    def left(self) -> int:
        """Records beyond those kept."""
        return self._left

    def records(self, index: int) -> Iterator[tuple[int, ...]]:
        """Yield what vCPU ``index`` recorded, in its order: the fields of each Record, which takes longer to make."""
        for chunk in self._raw[index]:
            yield from _RECORD.iter_unpack(chunk)

    @property
    def tids(self) -> dict[int, int]:
        """Thread of each vCPU that was seen in the guest."""
        return dict(self._tids)

    @property
    def samples(self) -> list[Sample]:
        """Pages, as of every look."""
        return list(self._samples)

    @property
    def heard(self) -> list[Heard]:
        """What went through the relay, in order of its beginning."""
        return sorted(self._heard, key=lambda heard: heard.ns)

    def faults(self) -> list[TracedFault]:
        """Stage-2 faults, if they were recorded."""
        return self._trace.faults() if self._trace is not None else []

    def changes(self) -> list[Event]:
        """What was done to memory from this side: conversions, punches, slots."""
        with self._lock:
            return [event for event in self._events if event.kind in ("convert", "punch", "slot")]

    def events(self) -> tuple[Event, ...]:
        """Return the timeline of faults, shares and changes."""
        self.collect()
        with self._lock:
            for index, chunks in enumerate(self._raw):
                for chunk in chunks[self._decoded[index] :]:
                    for record in map(Record._make, _RECORD.iter_unpack(chunk)):
                        if record.kind != lib.PV_REC_EXIT:
                            self._take(record)
                self._decoded[index] = len(chunks)
        return super().events()


class Ears:
    """Wraps the methods of one relay, and passes its events to ``heard``.

    Runs in the thread and under the locks of whoever calls them.
    """

    def __init__(self, relay: ShareRelay, heard: Callable[[Heard], None]) -> None:
        self._relay, self._hear = relay, heard
        self._subscribe, self._deliver, self._is_shared = relay.subscribe, relay.deliver, relay.is_shared
        self._asking = threading.local()

    def stand_ins(self) -> dict[str, Callable[..., Any]]:
        """Return what is to be called instead, by the method's name."""
        return {"subscribe": self.subscribe, "deliver": self.deliver, "is_shared": self.is_shared}

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """As ``ShareRelay.subscribe``, and take the time that ``subscriber`` takes."""
        owner = getattr(subscriber, "__self__", subscriber)
        who = str(getattr(owner, "name", "") or getattr(subscriber, "__name__", "a subscriber"))
        # A device listens first and then asks about the page that it was given.
        self._asking.who = who

        def timed(event: ShareEvent) -> None:
            began = time.monotonic_ns()
            subscriber(event)
            self._hear(Heard("told", who, event.gpa, event.npages, event.shared, began, time.monotonic_ns()))

        return self._subscribe(timed)

    def deliver(self, event: ShareEvent) -> None:
        """As ``ShareRelay.deliver``; the time counts from when it is this event's turn."""
        with self._relay.hold():
            began = time.monotonic_ns()
            self._deliver(event)
            self._hear(Heard("announced", "", event.gpa, event.npages, event.shared, began, time.monotonic_ns()))

    def is_shared(self, gpa: int) -> bool:
        """As ``ShareRelay.is_shared``, which the relay itself asks too."""
        answer = self._is_shared(gpa)
        if who := self._asking.__dict__.pop("who", ""):
            now = time.monotonic_ns()
            self._hear(Heard("asked", who, gpa, 1, answer, now, now))
        return answer
