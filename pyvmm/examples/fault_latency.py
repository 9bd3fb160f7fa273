# SPDX-License-Identifier: Apache-2.0
"""Measure a guest's first store to a page: cold, and where the host has populated the page before.

On a pKVM host, in nanoseconds::

    python -m pyvmm.examples.fault_latency

Elsewhere, in a lab that counts instructions::

    pyvmm lab exec --icount -- python3 -m pyvmm.examples.fault_latency

Without ``--icount`` the lab's times mean nothing: it is an emulator. The script says so. ``pyvmm bench fault`` does
the same with more states, confidence intervals and a significance test.
"""

from __future__ import annotations

import statistics

from pyvmm.experiment import Experiment
from pyvmm.experiment.environment import INSTRUCTIONS, counts
from pyvmm.guest.orders import Access
from pyvmm.labenv import in_lab
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

PAGES, ROUNDS = 64, 6


def touch(x: Experiment, *, populated: bool) -> list[float]:
    """Have the guest store to fresh pages. Return each store's ns, or instructions where the clock counts them."""
    begin, record = x.page(PAGES), x.page()
    x.guest.fill(record, HOST_PAGE)  # so that recording a time does not fault
    if populated:
        x.memory.populate(begin, PAGES * HOST_PAGE)
    touched = x.guest.touch(begin, PAGES, access=Access.WRITE, ticks_at=record)
    return [ticks * 1e9 / x.guest.ping().hz for ticks in touched.per_page]


def main() -> None:
    """Measure both by turns, without the first round, and print their medians."""
    seen: dict[str, list[float]] = {"cold": [], "populated": []}
    with Experiment(Protection.PKVM) as x:
        for turn in range(ROUNDS):
            for state, values in seen.items():
                fresh = touch(x, populated=state == "populated")
                values += fresh if turn else []
    unit = "instructions" if counts() == INSTRUCTIONS else "ns"
    for state, values in seen.items():
        print(f"{state:9} {len(values)} pages, median {statistics.median(values):,.0f} {unit} a first store")
    if in_lab() and unit == "ns":
        print("meaningless in time: this is an emulator; start the lab with --icount to count instructions")


if __name__ == "__main__":
    main()
