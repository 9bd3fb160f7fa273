# SPDX-License-Identifier: Apache-2.0
"""The host's cost of punching a hole: fallocate(2) on the file behind the guest's pages."""

from __future__ import annotations

import statistics
from typing import Any, Final

from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench
from pyvmm.bench.model import Point
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.guest.orders import Access
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import Backing
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import PROTECTIONS

PAGES: Final = 64
HOLES: Final = {"page": 1, "range": 16, "whole file": PAGES}
FOREVER: Final = 1 << 40


def _nonsense(point: Point) -> str:
    if point["load"] == "busy" and point["protection"] == "pkvm":
        return "a protected guest keeps its pages, so it does not come back for them"
    return ""


@case(
    says="a hole punched in the file of guest memory, per page of the hole: of a page, of 16, of the whole file, while"
    " the guest is idle or another vCPU stores to the same pages all the time (under pkvm the pages stay the guest's);"
    " a note tells what the same call takes where no page is",
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
    """Give the guest a separate file. Each round, have the guest access it, then punch it."""
    hole, size = HOLES[bench["hole"]] * HOST_PAGE, PAGES * HOST_PAGE
    busy = bench["load"] == "busy"
    with bench.guest(cpus=2 if busy else 1) as x:
        rounds: list[list[float]] = []
        gpa, file = BEYOND, _file(x, BEYOND, size)
        for number in range(bench.rounds):
            # A protected guest keeps its pages and does not fault again: after one punch its file would stay a hole.
            if number and bench.protection.by_hypervisor:
                gpa = Gpa(BEYOND + number * size)
                file = _file(x, gpa, size)
            x.guest.touch(gpa, PAGES, access=Access.WRITE)
            if busy and number == 0:
                x.others()[0].start_hammer(gpa, size, FOREVER, Access.WRITE)  # until the machine ends
            rounds.append([])
            for offset in range(0, size, hole):
                _punch(bench, file, offset, hole, rounds[-1])
        empty, call = raw.make(x, hole), list[float]()
        for _ in range(PAGES):
            _punch(bench, empty, 0, hole, call)
        notes: dict[str, Any] = {f"with no page there {bench.unit}": round(statistics.median(call), 1)}
        bench.keep("punch", rounds, clock="host", **notes)


def _file(x: Experiment, gpa: Gpa, size: int) -> Backing:
    """Give the guest a file of this point's kind in a new slot."""
    file = raw.make(x, size)
    raw.slot(x, gpa, size, file.hva, file=file.guest_memfd)
    return file


def _punch(bench: Bench, file: Backing, offset: int, size: int, took: list[float]) -> None:
    with bench.stopwatch(took, per=size // HOST_PAGE):
        answer = raw.punch(file.fd, offset, size)
    if answer != "ok":
        bench.cannot(f"fallocate(2) with FALLOC_FL_PUNCH_HOLE: {answer}")
