# SPDX-License-Identifier: Apache-2.0
"""The cost of a share and an unshare: the hypervisor's call, and the announcement to the VMM."""

from __future__ import annotations

from typing import Final

from pyvmm import abi
from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench, Ticks
from pyvmm.bench.model import Point
from pyvmm.guest.orders import Access, What
from pyvmm.pages import HOST_PAGE

PAGES: Final = 256
STORM: Final = 16_384
WITH_BELL: Final = 64
"""Pages a round that are announced as well."""


def _nonsense(point: Point) -> str:
    return "" if point["pages"] == PAGES or point["state"] == "touched" else "a storm is of touched pages"


@case(
    says="a share and an unshare of a page by the hypervisor's call (pyvmm answers it in emulated), of pages the guest"
    " has touched or never has; announced is with the ring of the share doorbell that tells the VMM",
    axes={"protection": ("pkvm", "emulated"), "state": ("touched", "untouched"), "pages": (PAGES, STORM)},
    quick=("state",),
    nonsense=_nonsense,
    seconds=300.0,
)
def share(bench: Bench) -> None:
    """Share a fresh range page by page, then unshare it, each call timed by the guest."""
    pages: int = bench["pages"]
    rounds = 2 if pages > PAGES else bench.rounds
    with bench.guest(room=rounds * (pages + WITH_BELL) * HOST_PAGE + 2 * pages * HOST_PAGE) as x:
        ticks = Ticks(x, pages)
        shares: list[list[float]] = []
        unshares: list[list[float]] = []
        announced: list[list[float]] = []
        for _ in range(rounds):
            begin, other = x.page(pages), x.page(WITH_BELL)
            if bench["state"] == "touched":
                x.guest.touch(begin, pages, access=Access.WRITE)
                x.guest.touch(other, WITH_BELL, access=Access.WRITE)
            for what, into in ((What.SHARE, shares), (What.UNSHARE, unshares)):
                order = x.guest.start_series(what, begin, pages, stride=HOST_PAGE, ticks_at=ticks.gpa)
                done = order.result(bench.seconds)
                if done.status:
                    bench.cannot(f"{what.name} of page {done.done} was refused: {done.status}")
                into.append(ticks.each(pages))
            both = x.guest.share(other, WITH_BELL, how=abi.SHARE_HVC | abi.SHARE_BELL)
            announced.append([both.ticks * ticks.scale / WITH_BELL])
        bench.keep("share", shares)
        bench.keep("unshare", unshares)
        bench.keep("announced share", announced)
