# SPDX-License-Identifier: Apache-2.0
"""Trace the hypervisor during operations of a guest, and report the cost of one operation.

    with Recorder(x) as recorder:
        for _ in range(bench.rounds):
            with recorder.over("share", pages):
                x.guest.series(What.SHARE, begin, pages, stride=HOST_PAGE)
    recorder.keep(bench, "share")

While it is entered, the caller and the guest's only vCPU run on one CPU, and only that CPU is evaluated. Tracing makes
each entry to EL2 slower, so measure with other clocks separately. It owns the hypervisor's trace buffer and the
affinity of these threads meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Final, Self

from pyvmm.bench.el2 import Residency, Window, residency, visits
from pyvmm.bench.measure import RULE, Bench
from pyvmm.bench.model import Series
from pyvmm.experiment import Experiment
from pyvmm.guest.orders import What
from pyvmm.guest.puppet import Puppet
from pyvmm.observe.hyptrace import HypTrace, now
from pyvmm.uapi.kvm_arm64_vcpu import KVM_ARM_SET_COUNTER_OFFSET, kvm_arm_counter_offset

NOBODYS_CALL: Final = 0x8600_00FE
"""An unassigned vendor call, which the host's KVM rejects: the cheapest exit to the host."""
_EXITS: Final = 64
_TRIES: Final = 10
_PINGS: Final = 16
_PATIENCE: Final = 1000
"""Milliseconds."""
_ORDER, _EXIT = "an order by itself", "an exit, to tell what tracing costs"


class Recorder:
    """Measures EL2 during blocks of code. A context manager, for a started guest with one vCPU.

    If recording is impossible, the blocks still run, and :attr:`why_not` has the reason.
    """

    def __init__(self, x: Experiment) -> None:
        self._x = x
        self._trace = HypTrace()
        self._windows: dict[str, list[Window]] = {}
        self._orders: dict[str, int] = {}
        self._threads = {0: set[int]()}
        self._cpu = max(os.sched_getaffinity(0))
        self._scale = self._tracing = 0.0
        self.event = 0.0
        """ns that EL2 needs to write one event; known at the end, 0 if it is below the noise."""
        self.why_not = "it has not begun"
        """Why there are no results; empty with results."""
        self._found: dict[str, list[Residency]] = {}

    def __enter__(self) -> Self:
        guest = self._x.guest
        self._scale = 1e9 / guest.ping().hz
        self._align_clocks()
        vcpu = next(each for each in threading.enumerate() if each.name == "pyvmm-vcpu0").native_id
        for thread in (0, vcpu or 0):
            self._threads[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, {self._cpu})
        try:
            untraced = self._exit(guest)
            self._trace.__enter__()
            self.why_not = self._trace.why_not
            if not self.why_not:
                with self.over(_ORDER, _PINGS, orders=0):
                    for _ in range(_PINGS):
                        guest.ping()
                with self.over(_EXIT, _TRIES * _EXITS, orders=_TRIES):
                    self._tracing = self._exit(guest) - untraced
        except BaseException:
            self._trace.__exit__()
            self._unpin()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._unpin()
        self._trace.__exit__()
        self.why_not = self.why_not or self._trace.why_not
        if self.why_not:
            return
        if self._trace.whole_since > min(each.begin for windows in self._windows.values() for each in windows):
            self.why_not = f"the hypervisor's trace buffer was too small: {self._trace.lost} events were lost"
            return
        seen = [visit for visit in visits(self._trace.events()) if visit.cpu == self._cpu]
        [order] = (residency(seen, window) for window in self._windows.pop(_ORDER))
        for name, windows in self._windows.items():
            self._found[name] = [
                residency(seen, each).less(order, times=self._orders[name] / each.operations) for each in windows
            ]
        [probe] = self._found.pop(_EXIT)
        self.event = max(self._tracing / (2 * probe.visits), 0.0)

    @contextlib.contextmanager
    def over(self, name: str, operations: int, *, orders: int = 1) -> Iterator[None]:
        """Measure the block as ``operations`` of ``name``, without the cost of ``orders`` to the guest."""
        begin = now()
        yield
        self._windows.setdefault(name, []).append(Window(begin, now(), operations))
        self._orders[name] = orders

    def residencies(self, name: str) -> list[Residency]:
        """Return an operation's cost at EL2 in each block of that name, with tracing; empty before the end."""
        return self._found.get(name, [])

    def keep(self, bench: Bench, name: str, *, per: str = "page") -> None:
        """Keep a series of ns at EL2 per operation, one value per block, or the reason without values.

        The notes have the mean by entry reason, the number of EL2 entries, and the error from truncated timestamps.
        """
        found = self.residencies(name)
        warm = int(len(found) > 1)
        kept = [each.without_tracing(self.event) for each in found[warm:]]
        notes = {f"stamps' error {bench.unit}": _mean(each.error for each in kept)} if kept else {}
        for reason in sorted({reason for each in kept for reason in each.ns}):
            notes[f"{reason} {bench.unit}"] = _mean(each.ns.get(reason, 0.0) for each in kept)
            notes[f"{reason} entries"] = _mean(each.entries.get(reason, 0.0) for each in kept)
        bench.series.append(
            Series(
                bench.case,
                bench.point,
                name,
                "el2",
                bench.unit,
                per,
                tuple(round(each.without_tracing(self.event).total, 1) for each in found),
                warmup=warm,
                rule=RULE if warm else "",
                rounds=(1,) * len(found),
                unavailable="" if found else self.why_not or "nothing was counted",
                notes=dict(notes),
            )
        )

    def _align_clocks(self) -> None:
        """Set the guest's counter equal to the host's, as in a protected guest: the trace depends on it."""
        if self._x.protection.by_hypervisor:
            return
        for _ in range(_PATIENCE):
            _, error = self._x.machine.vm.attempt(KVM_ARM_SET_COUNTER_OFFSET, kvm_arm_counter_offset())
            if error != errno.EBUSY:  # the vCPU is still on its way to where it waits for orders
                return
            time.sleep(0.001)

    def _exit(self, guest: Puppet) -> float:
        """Return the ns of an empty exit, the minimum of a few tries."""
        tries = [guest.series(What.HVC, count=_EXITS, value=NOBODYS_CALL).ticks for _ in range(_TRIES)]
        return min(tries) * self._scale / _EXITS

    def _unpin(self) -> None:
        for thread, cpus in self._threads.items():
            with contextlib.suppress(ProcessLookupError):  # the guest may have ended meanwhile
                os.sched_setaffinity(thread, cpus)


def _mean(values: Iterator[float]) -> float:
    return round(statistics.fmean(values), 2)
