# SPDX-License-Identifier: Apache-2.0
"""EL2 residency: how long the hypervisor runs for an operation, on an otherwise idle CPU, from its own trace."""

from __future__ import annotations

from typing import Any, Final

from pyvmm.bench.case import case
from pyvmm.bench.el2 import Residency
from pyvmm.bench.measure import Bench
from pyvmm.bench.residency import NOBODYS_CALL, Recorder
from pyvmm.guest.orders import Access, What
from pyvmm.pages import HOST_PAGE

PAGES: Final = 256
ENDS: Final = 5
"""Rounds of two VMs' ends."""


@case(
    says="the hypervisor's time in an exit, a first touch of a page (cold, and populated by the host before), a share,"
    " an unshare, a share of a page never touched, and at the VM's end for a page and for all the rest; tracing's own"
    " cost is taken off",
    axes={"protection": ("pkvm", "none", "emulated"), "pages": (PAGES, 1024)},
    quick=("protection",),
)
def residency(bench: Bench) -> None:
    """Trace the hypervisor during each operation of a guest, and during the ends of a few VMs."""
    pages: int = bench["pages"]
    protected = bench.protection.by_hypervisor
    room = (3 * bench.rounds + 1) * pages * HOST_PAGE
    with bench.guest(room=room) as x:
        with Recorder(x) as recorder:
            if recorder.why_not:
                bench.cannot(recorder.why_not)
            for _ in range(bench.rounds):
                touched, untouched = x.page(2 * pages), x.page(pages)
                cold, there = touched, touched + pages * HOST_PAGE
                x.memory.populate(there, pages * HOST_PAGE)
                with recorder.over("exit", 2 * pages):
                    x.guest.series(What.HVC, count=2 * pages, value=NOBODYS_CALL)
                for name, begin in (("first touch", cold), ("populated page's first touch", there)):
                    with recorder.over(name, pages):
                        x.guest.touch(begin, pages, access=Access.WRITE)
                if not protected:
                    continue
                for name, what, begin, count in (
                    ("share", What.SHARE, touched, 2 * pages),
                    ("unshare", What.UNSHARE, touched, 2 * pages),
                    ("untouched page's share", What.SHARE, untouched, pages),
                ):
                    with recorder.over(name, count):
                        done = x.guest.series(what, begin, count, stride=HOST_PAGE)
                    if done.status:
                        bench.cannot(f"the {name} of page {done.done} was refused: {done.status}")
        recorder.keep(bench, "exit", per="exit")
        recorder.keep(bench, "first touch")
        recorder.keep(bench, "populated page's first touch")
        if protected:
            recorder.keep(bench, "share")
            recorder.keep(bench, "unshare")
            recorder.keep(bench, "untouched page's share")
    _ends(bench, pages)


def _ends(bench: Bench, pages: int) -> None:
    """End VMs whose guests have accessed ``pages`` pages, and others with none. The difference is the cost of pages."""
    per_page, rest = [], []
    ends: list[Residency] = []
    for _ in range(ENDS):
        ends = []
        for touched in (0, pages):
            with bench.guest(room=pages * HOST_PAGE) as x:
                if touched:
                    x.guest.touch(x.page(touched), touched, access=Access.WRITE)
                with Recorder(x) as recorder, recorder.over("end", 1, orders=0):
                    x.end()
                if recorder.why_not:
                    bench.cannot(recorder.why_not)
                ends.append(recorder.residencies("end")[0].without_tracing(recorder.event))
        per_page.append([(ends[1].total - ends[0].total) / pages])
        rest.append([ends[0].total])
    errors: list[dict[str, Any]] = [
        {f"stamps' error {bench.unit}": round(error, 2)} for error in (ends[1].error / pages, ends[0].error)
    ]
    bench.keep("page at the VM's end", per_page, clock="el2", **errors[0])
    bench.keep("rest of the VM's end", rest, clock="el2", per="VM", **errors[1])
