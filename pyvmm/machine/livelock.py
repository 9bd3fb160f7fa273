# SPDX-License-Identifier: Apache-2.0
"""End a protected guest that faults at one address for ever.

A host's page may be larger than 4 KiB. pKVM then never resolves a fault behind the first 4 KiB of a page if the next
page is mapped: see pyvmm/docs/hosts.md. The vCPU then stays in KVM_RUN, and only the kernel's statistics show that it
is not at work. Where the kernel's trace can be read, it tells the address, and the run ends. Elsewhere a warning is
logged.

Owns a thread, from before the vCPUs start until the machine is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from pyvmm._native import lib
from pyvmm.errors import hex_
from pyvmm.kvm.faulttrace import FaultTrace, TracedFault
from pyvmm.log import get_logger
from pyvmm.pages import HOST_PAGE
from pyvmm.typed import NamedTuple
from pyvmm.vcpu.outcome import Ending, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Self

    from pyvmm._native import pv_vcpu
    from pyvmm.kvm.vcpu import Vcpu

log = get_logger("machine")

INTERVAL: Final = 1.0
"""Seconds between two looks at the counters."""
RATE: Final = 300
"""Exits a second without another event, from which on a vCPU is suspected. Interrupts of the host are fewer or as many:
the trace decides."""
STREAK: Final = 3
"""Suspicious intervals in a row, before the trace is asked."""
TRACED: Final = 0.5
"""Seconds of the trace."""
PROOF: Final = 100
"""Faults of one vCPU in the trace, all at one address, that prove the fault."""
_EVENTS: Final = ("hvc_exit_stat", "wfe_exit_stat", "wfi_exit_stat", "mmio_exit_user", "mmio_exit_kernel")

HINT: Final = "boot a host kernel with pages of 4 KiB for protected guests"
FAULT: Final = (
    f"on a host with pages of {HOST_PAGE >> 10} KiB, pKVM never resolves a fault behind the first 4 KiB of a page if "
    "the next page is mapped"
)


class Sample(NamedTuple):
    """A vCPU's counters: all its exits to the host's kernel, and the events that show that it is at work."""

    exits: int
    events: int


class Streak:
    """A vCPU's recent past."""

    def __init__(self) -> None:
        self._last: Sample | None = None
        self._length = 0

    def add(self, sample: Sample) -> bool:
        """Take the next sample, and return whether the vCPU is suspected."""
        last, self._last = self._last, sample
        idle = last is not None and sample.events == last.events and sample.exits - last.exits >= RATE * INTERVAL
        self._length = self._length + 1 if idle else 0
        return self._length >= STREAK


def repeated(faults: Iterable[TracedFault]) -> TracedFault | None:
    """Return the last fault of a vCPU that has faulted at one address only, at least ``PROOF`` times."""
    by_thread: dict[int, list[TracedFault]] = {}
    for fault in faults:
        by_thread.setdefault(fault.tid, []).append(fault)
    for found in by_thread.values():
        if len(found) >= PROOF and len({fault.gpa for fault in found}) == 1:
            return found[-1]
    return None


class Watchdog:
    """Watches ``vcpus`` until it is closed. ``finish`` ends the run. Enter it before their threads start.

    A vCPU's statistics cannot be opened while it runs.
    """

    def __init__(self, vcpus: Sequence[Vcpu], natives: Sequence[pv_vcpu], finish: Callable[[Outcome], object]) -> None:
        self._vcpus, self._natives, self._finish = vcpus, natives, finish
        self._streaks = [Streak() for _ in vcpus]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pyvmm-livelock", daemon=True)

    def __enter__(self) -> Self:
        for vcpu in self._vcpus:
            vcpu.stats()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            suspected = [streak.add(self._sample(index)) for index, streak in enumerate(self._streaks)]
            if any(suspected) and self._judge():
                return

    def _sample(self, index: int) -> Sample:
        stats, own = self._vcpus[index].stats(), self._natives[index].stats
        events = [*(stats.get(name, 0) for name in _EVENTS), *(own[code].count for code in range(lib.PV_EXITS))]
        exits = stats.get("exits", 0)
        return Sample(exits if isinstance(exits, int) else 0, sum(each for each in events if isinstance(each, int)))

    def _judge(self) -> bool:
        """Ask the trace, and end the run if it proves the fault. Returns whether nothing is left to do."""
        with FaultTrace() as trace:
            if not trace.available:
                log.warning("a_vcpu_may_fault_for_ever", fault=FAULT, why_not_sure=trace.why_not)
                return True
            self._ended.wait(TRACED)
        fault = repeated(trace.faults())
        if fault is None:
            return False
        index = next((index for index, each in enumerate(self._natives) if each.tid == fault.tid), None)
        self._finish(Outcome(Ending.FAILED, told(fault), index, HINT))
        return True


def told(fault: TracedFault) -> str:
    """Return the sentence that ends the run."""
    kind = "an instruction" if fault.fetch else "data"
    return f"the guest faults on {kind} at gpa {hex_(fault.gpa)} for ever: {FAULT}"
