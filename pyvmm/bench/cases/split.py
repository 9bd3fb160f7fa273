# SPDX-License-Identifier: Apache-2.0
"""Where the time of a cold donation goes: EL2, account and pin, allocation and zeroing, exit and entry."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Final

from pyvmm.bench.case import case
from pyvmm.bench.el2 import Cost
from pyvmm.bench.measure import Bench
from pyvmm.bench.residency import NOBODYS_CALL, Recorder
from pyvmm.bench.split import PARTS, WHOLE, Measured
from pyvmm.guest.orders import Access, What
from pyvmm.memory import mman
from pyvmm.pages import HOST_PAGE
from pyvmm.uapi.mman import MADV_POPULATE_WRITE

PAGES: Final = 512
CLOCKS: Final = {
    WHOLE: "guest",
    "EL2": "el2",
    "account and pin": "guest",
    "allocation and zeroing": "host",
    "exit and entry": "guest",
}


@case(
    says="where the time of a cold first touch goes under pkvm: at EL2, to account for and pin the page, to allocate"
    " and zero it, to leave the guest and enter it again; each by a measurement of its own: they need not add up",
    axes={"protection": ("pkvm",), "backing": ("memfd",), "pages": (PAGES,)},
)
def split(bench: Bench) -> None:
    """Under the trace, repeat in rounds: access a cold range, access a populated range, and make empty exits."""
    pages: int = bench["pages"]
    room = 3 * bench.rounds * pages * HOST_PAGE
    with bench.guest(room=room) as x:
        scale = 1e9 / x.guest.ping().hz
        untraced = [
            [x.guest.touch(x.page(pages), pages, access=Access.WRITE).ticks * scale / pages]
            for _ in range(bench.rounds)
        ]
        took = defaultdict[str, list[float]](list)
        with Recorder(x) as recorder:
            if recorder.why_not:
                bench.cannot(recorder.why_not)
            for _ in range(bench.rounds):
                cold, there = x.page(pages), x.page(pages)
                with recorder.over("exit", pages):
                    ticks = x.guest.series(What.HVC, count=pages, value=NOBODYS_CALL).ticks
                took["exit"].append(ticks * scale / pages)
                with recorder.over("cold", pages):
                    ticks = x.guest.touch(cold, pages, access=Access.WRITE).ticks
                took["cold"].append(ticks * scale / pages)
                for name in ("populating", "again"):
                    with recorder.over(name, pages, orders=0):
                        begun = time.monotonic_ns()
                        mman.advise(x.memory.hva(there), pages * HOST_PAGE, MADV_POPULATE_WRITE)
                        took[name].append((time.monotonic_ns() - begun) / pages)
                with recorder.over("populated", pages):
                    ticks = x.guest.touch(there, pages, access=Access.WRITE).ticks
                took["populated"].append(ticks * scale / pages)
        if recorder.why_not:
            bench.cannot(recorder.why_not)
    found = [
        Measured(**{name: Cost(took[name][each], recorder.residencies(name)[each], recorder.event) for name in took})
        for each in range(bench.rounds)
    ]
    for metric in (WHOLE, *PARTS):
        bench.keep(metric, [[each.split()[metric]] for each in found], clock=CLOCKS[metric])
    bench.keep("whole, not traced", untraced)
    bench.keep("tracing", [[each.cold.traced - each.cold.whole] for each in found], clock="el2")
