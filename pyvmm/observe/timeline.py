# SPDX-License-Identifier: Apache-2.0
"""The events of guest memory in a run, in order: faults, shares, and changes by the VMM.

A :class:`Timeline` owns the list, and is the only reader of its vCPUs' rings. It adds no cost to the guest: rings are
always written, the kernel's trace has its own owner, and it does not subscribe to shares, which would stop the loop at
each.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from pyvmm._native import ffi, lib
from pyvmm.memory.address import Gpa
from pyvmm.pages import HOST_PAGE, HOST_PAGE_SHIFT

if TYPE_CHECKING:
    from pyvmm._native import pv_record, pv_vcpu
    from pyvmm.kvm.faulttrace import FaultTrace
    from pyvmm.memory.memory import Memory

KINDS: Final = ("fault", "share", "unshare", "convert", "punch", "slot")
"""A stage-2 fault; a page shared, or taken back; a page moved to another backing, or dropped from its own; a slot added
or removed."""
MOST: Final = 1 << 17
"""Maximum events to keep, so that a guest cannot fill memory. The first ones are kept."""
_BATCH: Final = 512


class Record(NamedTuple):
    """``struct pv_record``, field by field."""

    ns: int
    kind: int
    lost: int
    code: int
    vcpu: int
    size: int
    addr: int
    value: int


class Event(NamedTuple):
    """``kind``, one of KINDS, happened to ``pages`` pages from ``gpa``; ``ns`` is CLOCK_MONOTONIC."""

    ns: int
    kind: str
    gpa: int
    pages: int = 1


class Timeline:
    """Records one machine's events. ``trace`` provides faults, if available.

    The trace must exclude faults at the addresses of devices. Every method may be called from any thread.
    """

    def __init__(self, trace: FaultTrace | None = None) -> None:
        self._trace = trace
        self._natives: Sequence[pv_vcpu] = ()
        self._events: list[Event] = []
        self._left_out = 0
        self._lock = threading.Lock()
        self._batch = ffi.new("struct pv_record[]", _BATCH)

    def watch(self, memory: Memory, natives: Sequence[pv_vcpu]) -> None:
        """Record what ``natives`` (``struct pv_vcpu``) have in their rings, and what is done to ``memory`` from now on.

        Both must be alive whenever :meth:`events` is called, or :meth:`stop` have been.
        """
        self._natives = natives
        memory.on_change = self._changed

    def stop(self) -> None:
        """Take what is in the rings, and look at them no more."""
        self.collect()
        with self._lock:
            self._left_out += self._dropped()
            self._natives = ()

    def collect(self) -> None:
        """Take what is in the rings and in the kernel's buffer: their room is limited, and so a long run wants this."""
        with self._lock:
            for native in self._natives:
                while count := lib.pv_ring_read(ffi.addressof(native.ring), self._batch, _BATCH):
                    for record in self._batch[0:count]:
                        self._take(record)
        if self._trace is not None:
            self._trace.collect()

    def events(self) -> tuple[Event, ...]:
        """Return everything recorded until now, by time."""
        self.collect()
        faults = self._trace.faults() if self._trace is not None else []
        with self._lock:
            found = [*self._events, *(Event(fault.ns, "fault", fault.gpa) for fault in faults)]
        return tuple(sorted(found, key=lambda event: event.ns))

    @property
    def lost(self) -> int:
        """The number of events dropped for lack of room, in a ring, in the kernel's buffer or here."""
        with self._lock:
            lost = self._dropped() + self._left_out
        return lost + (self._trace.lost if self._trace is not None else 0)

    @property
    def why_no_faults(self) -> str:
        """Why faults are not recorded; empty if they are."""
        return self._trace.why_not if self._trace is not None else "nobody asked for them"

    @property
    def notes(self) -> list[str]:
        """Notes about missing events, which a picture must show."""
        found = [f"faults were not recorded: {self.why_no_faults}"] if self.why_no_faults else []
        return [*found, *([f"{self.lost:,} events were lost: there was no room for them"] if self.lost else [])]

    def _dropped(self) -> int:
        return sum(int(native.ring.dropped) for native in self._natives)

    def _changed(self, kind: str, gpa: Gpa, size: int) -> None:
        with self._lock:
            self._add(Event(time.monotonic_ns(), kind, gpa, size >> HOST_PAGE_SHIFT))

    def _add(self, event: Event) -> None:
        if len(self._events) < MOST:
            self._events.append(event)
        else:
            self._left_out += 1

    def _take(self, record: pv_record | Record) -> None:
        if record.kind in (lib.PV_REC_SHARE, lib.PV_REC_UNSHARE):
            # A refused one has changed nothing.
            if record.value == 0:
                kind = "share" if record.kind == lib.PV_REC_SHARE else "unshare"
                self._add(Event(record.ns, kind, record.addr & -HOST_PAGE))
        elif record.kind == lib.PV_REC_FAULT and record.size and self.why_no_faults:
            # KVM_RUN failed and said where; with the kernel's trace that fault is there already.
            self._add(Event(record.ns, "fault", record.addr & -HOST_PAGE))
