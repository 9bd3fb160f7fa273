# SPDX-License-Identifier: Apache-2.0
"""The cost of a conversion, for each policy of the emulated protection, and of the guest's next access."""

from __future__ import annotations

from typing import Final

from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench, Ticks
from pyvmm.bench.model import Point
from pyvmm.guest.orders import Access, What
from pyvmm.pages import HOST_PAGE

PAGES: Final = 64
APART: Final = {"range": 1, "scattered pages": 2}


def _nonsense(point: Point) -> str:
    if point["backing"] == "private" and point["policy"] != "copy":
        return "what lies in a private guest_memfd can only be copied to be shared"
    return ""


@case(
    says="a conversion there (share) and back (unshare), by the policy that pyvmm follows in emulated, of pages"
    " side by side or apart; touch after is the guest's first load of a page after it was converted",
    axes={
        "protection": ("emulated",),
        "policy": ("preserve", "zero", "punch", "copy"),
        "of": tuple(APART),
        "backing": ("memfd", "guest_memfd", "private"),
    },
    quick=("policy",),
    extra=({"policy": "copy", "backing": "private"}, {"policy": "copy", "of": "scattered pages"}),
    nonsense=_nonsense,
)
def convert(bench: Bench) -> None:
    """Convert pages the guest has written, each timed by the guest, and touch them."""
    apart = APART[bench["of"]]
    with bench.guest(room=bench.rounds * PAGES * apart * HOST_PAGE, conversion=bench["policy"]) as x:
        ticks = Ticks(x, PAGES)
        names = ("share", "touch after share", "unshare", "touch after unshare")
        found: dict[str, list[list[float]]] = {name: [] for name in names}
        for _ in range(bench.rounds):
            begin = x.page(PAGES * apart)
            x.guest.touch(begin, PAGES, stride=apart, access=Access.WRITE)
            for name, what in (("share", What.SHARE), ("unshare", What.UNSHARE)):
                done = x.guest.series(what, begin, PAGES, stride=apart * HOST_PAGE, ticks_at=ticks.gpa)
                if done.status:
                    bench.cannot(f"the {name} of page {done.done} was refused: {done.status}")
                found[name].append(ticks.each(PAGES))
                touched = x.guest.start_touch(begin, PAGES, stride=apart, ticks_at=ticks.gpa).result()
                touched = touched.with_each(ticks.read(8 * PAGES))
                found[f"touch after {name}"].append([each * ticks.scale for each in touched.per_page])
        for name, rounds in found.items():
            bench.keep(name, rounds)
