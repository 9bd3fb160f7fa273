# SPDX-License-Identifier: Apache-2.0
"""The cost of an exit, from a guest's instruction to the next, for each handler."""

from __future__ import annotations

import os
from typing import Any, Final

from pyvmm import abi
from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench, Exits, Ticks
from pyvmm.bench.model import Point
from pyvmm.experiment import Experiment
from pyvmm.guest.orders import What
from pyvmm.machine import layout
from pyvmm.protection import PROTECTIONS

COUNT: Final = 300
IOEVENTFD: Final = 0x800
"""The offset in the bench device's doorbell page at which the kernel itself takes stores."""
UNKNOWN_HVC: Final = 0x8600_00FE
"""An unassigned vendor call: the host's KVM answers NOT_SUPPORTED, under pKVM after EL2 has passed it on."""

# The handler, the address or function, and the loop's exit class (none: the loop does not see it).
KINDS: Final[dict[str, tuple[What, int, str]]] = {
    "registers": (What.STORE, layout.BENCH.start + abi.BENCH_REGISTERS, "mmio-registers"),
    "doorbell": (What.STORE, layout.BENCH.start + abi.BENCH_DOORBELL, "mmio-doorbell"),
    "python": (What.STORE, layout.BENCH.start + abi.BENCH_COLD, "mmio-python"),
    "ioeventfd": (What.STORE, layout.BENCH.start + abi.BENCH_DOORBELL + IOEVENTFD, ""),
    "hvc": (What.HVC, abi.HVC_FEATURES, ""),
    "hvc-host": (What.HVC, UNKNOWN_HVC, ""),
    "nothing": (What.NOTHING, 0, ""),
}


def _nonsense(point: Point) -> str:
    what, _, told = KINDS[str(point["kind"])]
    if point["access"] == "load" and (what is not What.STORE or not told):
        return f"cannot load from a {point['kind']}"
    return ""


@case(
    says="an exit: a register file, a doorbell (its eventfd is written each time) and a device in Python behind pyvmm's"
    " loop; an ioeventfd in the kernel; a hypervisor call that EL2 answers under pkvm, and one that it hands on;"
    " nothing is the timing itself",
    axes={"protection": PROTECTIONS, "kind": tuple(KINDS), "access": ("store", "load")},
    quick=("kind",),
    nonsense=_nonsense,
)
def exit(bench: Bench) -> None:
    """Time ``COUNT`` consecutive exits one by one, and read the loop's own share of the time."""
    what, address, told = KINDS[bench["kind"]]
    if bench["access"] == "load":
        what = What.LOAD
    with bench.guest(timed=True) as x:
        if bench["kind"] == "ioeventfd":
            fd = os.eventfd(0, os.EFD_CLOEXEC)
            x.stack.callback(os.close, fd)
            x.machine.vm.ioeventfd(fd, address, 8)
        ticks = Ticks(x, COUNT)
        call: dict[str, Any] = {"value": address} if what is What.HVC else {"gpa": address, "value": 1}
        rounds, vmm, kvm, exits = [], [], [], Exits(x)
        for _ in range(bench.rounds):
            before = _vmm(x, told)
            exits.begin()
            x.guest.series(what, count=COUNT, ticks_at=ticks.gpa, **call)
            kvm.append([exits.end() / COUNT])
            vmm.append([(_vmm(x, told) - before) / COUNT])
            rounds.append(ticks.each(COUNT))
        bench.keep("exit", rounds, per="exit")
        if told:
            bench.keep("in the VMM", vmm, clock="vmm", per="exit")
        bench.keep("KVM's exits", kvm, clock="kvm", unit="count", per="exit")


def _vmm(x: Experiment, told: str) -> int:
    """Return the ns from KVM_RUN's return to its next call, of one class of exits."""
    return sum(each.vmm_ns for each in x.machine.counters.exits if each.name == told)
