"""What it costs the host to punch a hole: fallocate(2) on the file behind pages that the guest has."""

from __future__ import annotations

import contextlib
from typing import Final

from pyvmm.atlas import raw
from pyvmm.atlas.experiment import BEYOND
from pyvmm.bench.case import PROTECTIONS, case
from pyvmm.bench.measure import Bench
from pyvmm.bench.model import Point
from pyvmm.guest.puppet import Access
from pyvmm.memory.address import PAGE_SIZE

PAGES: Final = 64
HOLES: Final = {"page": 1, "range": 16, "whole file": PAGES}
FOREVER: Final = 1 << 40


def _nonsense(point: Point) -> str:
    if point["load"] == "busy" and point["protection"] == "pkvm":
        return "a protected guest keeps its pages, so it does not come back for them"
    return ""


@case(
    says="a hole punched in the file of guest memory, per page of the hole: of a page, of 16, of the whole file, while"
    " the guest is idle or another vCPU stores to the same pages all the time (under pkvm the pages stay the guest's)",
    axes={
        "protection": PROTECTIONS,
        "hole": tuple(HOLES),
        "backing": ("memfd", "guest_memfd", "private"),
        "load": ("idle", "busy"),
    },
    quick=("hole",),
    nonsense=_nonsense,
)
def punch(bench: Bench) -> None:
    """Put a file of its own into the guest, have the guest touch it, punch it, and touch it again the next round."""
    hole, size = HOLES[bench["hole"]] * PAGE_SIZE, PAGES * PAGE_SIZE
    busy = bench["load"] == "busy"
    with bench.guest(cpus=2 if busy else 1) as x:
        file = raw.make(x, size)
        guest_memfd = file.guest_memfd if bench["backing"] != "memfd" else None
        raw.slot(x, BEYOND, size, file.hva, file=guest_memfd)
        with contextlib.ExitStack() as stack:
            if busy:
                [other] = x.others()
                stop = x.page()
                x.guest.write64(stop, 0)
                order = other.start_count(BEYOND, FOREVER, until=stop)
                stack.callback(order.result)
                stack.callback(x.guest.write64, stop, 1)
            rounds: list[list[float]] = []
            for _ in range(bench.rounds):
                x.guest.touch(BEYOND, PAGES, access=Access.WRITE)
                rounds.append([])
                for offset in range(0, size, hole):
                    with bench.stopwatch(rounds[-1], per=hole // PAGE_SIZE):
                        answer = raw.punch(file.fd, offset, hole)
                    if answer != "ok":
                        bench.cannot(f"fallocate(2) with FALLOC_FL_PUNCH_HOLE: {answer}")
        bench.keep("punch", rounds, clock="host")
