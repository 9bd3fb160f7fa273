# SPDX-License-Identifier: Apache-2.0
"""Compare first accesses with the kernel's demand_paging_test: the same backing, access, order and pages, in turns.

The test times a vCPU on the host, from before its KVM_RUN until its guest has written the first word of every page.
This includes the pages of its guest's own code, less than one percent of several thousand. The test's first figure,
from the threads' start to their end, is not used: on one CPU it includes spinning threads. pyvmm's guest times each
access by its counter, and the times are added up.

The slots are alike too: see :func:`ours`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from pyvmm.bench.model import Point, Series
from pyvmm.bench.peers import OWN, TURNS, kept, pair
from pyvmm.bench.peers.selftests import PAGES, longest, mode_of, run
from pyvmm.experiment import BEYOND, Experiment, raw
from pyvmm.guest.orders import Access
from pyvmm.memory.address import Gpa
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

NAME: Final = "demand_paging_test"
FEW: Final = 512
"""Pages a turn where a thread in user space serves each."""

OTHERS: Final[Mapping[str, tuple[Point, tuple[str, ...], int]]] = {
    "anonymous": ({"what": "first write", "backing": "anonymous"}, ("-s", "anonymous"), PAGES),
    "missing": ({"what": "first write, userfaultfd copies", "backing": "memfd"}, ("-s", "shmem", "-u", "MISSING"), FEW),
    "minor": ({"what": "first write, userfaultfd maps", "backing": "memfd"}, ("-s", "shmem", "-u", "MINOR"), FEW),
}
"""What the test can besides, and options of it: what a VMM of another make would see."""


def theirs(pages: int, *options: str) -> float:
    """Return the ns a page that demand_paging_test says its vCPU took."""
    said = run(NAME, "-m", mode_of(NAME), "-v", "1", "-b", str(pages * HOST_PAGE), *options)
    return longest(said) / pages


def ours(pages: int, *, blocks: bool = False) -> float:
    """Return the ns a page that a plain guest of pyvmm's took, by its own counter.

    With ``blocks`` the slot lies in blocks of guest memory as its file's mapping does in blocks of the process. As
    pyvmm places all memory so, KVM can map blocks, and looks for one at each fault. It cannot in the test's slot.
    """
    size = pages * HOST_PAGE
    with Experiment(Protection.NONE, "memfd") as x:
        begin = Gpa(BEYOND if blocks else BEYOND + HOST_PAGE)
        raw.slot(x, begin, size, raw.make(x, size).hva)
        touched = x.guest.touch(begin, pages, access=Access.WRITE)
        return touched.ticks * 1e9 / x.guest.ping().hz / pages


def fault_in() -> list[Series]:
    """Measure first writes of a memfd by turns, who begins alternating; then what else both can."""
    mode_of(NAME)  # where the test is not there, nothing is measured
    peer: list[list[float]] = []
    own: list[list[float]] = []
    for turn in range(TURNS):
        sides: list[tuple[list[list[float]], Callable[[], float]]] = [
            (peer, lambda: theirs(PAGES, "-s", "shmem")),
            (own, lambda: ours(PAGES)),
        ]
        for values, measured in sides if turn % 2 else reversed(sides):
            values.append([measured()])
    point: Point = {"what": "first write", "backing": "memfd"}
    series = pair(NAME, point, "fault-in", own, peer, clocks=("host", "guest"), per="page", pages=PAGES)
    turns = [[ours(PAGES, blocks=True)] for _ in range(TURNS)]
    blocks: Point = {"what": "first write, KVM looks for blocks", "backing": "memfd", "peer": OWN}
    series.append(kept(blocks, "fault-in", turns, clock="guest", per="page", pages=PAGES))
    for others, options, pages in OTHERS.values():
        turns = [[theirs(pages, *options)] for _ in range(TURNS)]
        series.append(kept({**others, "peer": NAME}, "fault-in", turns, clock="host", per="page", pages=pages))
    return series


PEERS: Final[Mapping[str, Callable[[], list[Series]]]] = {NAME: fault_in}
