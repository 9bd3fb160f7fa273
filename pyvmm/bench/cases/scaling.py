# SPDX-License-Identifier: Apache-2.0
"""Exits per second, by the number of concurrent vCPUs and by handler."""

from __future__ import annotations

import time
from typing import Final

from pyvmm import abi
from pyvmm._native import lib
from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench
from pyvmm.experiment import Experiment
from pyvmm.guest.orders import Access
from pyvmm.machine import layout
from pyvmm.protection import PROTECTIONS

WINDOW: Final = 0.5
"""Seconds of a round."""
FOREVER: Final = 1 << 40
APART: Final = 256
"""Bytes between the registers of two vCPUs, so that they share no cache line of the host."""
KINDS: Final = {
    "python": (abi.BENCH_COLD, lib.PV_EXIT_MMIO_COLD),
    "registers": (abi.BENCH_REGISTERS, lib.PV_EXIT_MMIO_REGISTERS),
}
CPUS: Final = (1, 2, 4)


@case(
    says="exits a second while every vCPU stores to a device all the time: to one in Python, whose lock (the GIL) one"
    " thread has at a time, or to a register file in pyvmm's loop, which has none; in all, and of each vCPU; by the"
    " host's clock, half a second a round",
    axes={"protection": PROTECTIONS, "kind": tuple(KINDS), "cpus": CPUS},
    quick=None,
    extra=tuple({"kind": "registers", "cpus": cpus} for cpus in CPUS[1:]),
)
def scaling(bench: Bench) -> None:
    """Have every vCPU of one guest store without end, and sample the loop's counters."""
    offset, code = KINDS[bench["kind"]]
    with bench.guest(cpus=bench["cpus"]) as x:
        for guest in reversed([x.guest, *x.others()]):
            guest.start_hammer(layout.BENCH.start + offset + guest.vcpu * APART, 8, FOREVER, Access.WRITE)
        rounds = [_rates(x, code) for _ in range(bench.rounds)]
    bench.keep("exits", [[sum(each)] for each in rounds], clock="host", unit="count", per="second")
    bench.keep("exits of a vCPU", rounds, clock="host", unit="count", per="second")


def _rates(x: Experiment, code: int) -> list[float]:
    """Return each vCPU's exits a second over a window."""
    began, before = time.monotonic_ns(), _counts(x, code)
    time.sleep(WINDOW)
    ended, after = time.monotonic_ns(), _counts(x, code)
    seconds = (ended - began) / 1e9
    return [(now - then) / seconds for then, now in zip(before, after, strict=True)]


def _counts(x: Experiment, code: int) -> list[int]:
    return [int(native.stats[code].count) for native in x.machine.natives]
