# SPDX-License-Identifier: Apache-2.0
"""The effect of several ways to prepare memory on the cost of first accesses, and their own cost."""

from __future__ import annotations

import contextlib
from typing import Final

from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench, Ticks
from pyvmm.experiment import Experiment, raw
from pyvmm.experiment.host import settings
from pyvmm.guest.orders import Access
from pyvmm.memory.address import MIB, Gpa
from pyvmm.pages import HOST_PAGE, HUGE_SIZE

MEANS: Final = ("nothing", "allocate", "populate", "huge pages", "populated huge pages", "--prefault")
UNPREPARED: Final = ("nothing", "huge pages")
"""Means of which nothing is left to do for a guest."""


@case(
    says="first touches of all pages of a fresh range, in order, and what was done before: nothing, fallocate(2),"
    " MADV_POPULATE_WRITE, huge pages (shmem_enabled: advise), both, or what pyvmm run --prefault does; together is the"
    " preparation and the touches",
    axes={"protection": ("pkvm", "none"), "means": MEANS, "size": (2, 32)},
    quick=("means",),
    seconds=300.0,
)
def prefault(bench: Bench) -> None:
    """Make a guest each round, prepare its memory by the host's clock, and have it touched by the guest's."""
    size, means = bench["size"] * MIB, bench["means"]
    pages = size // HOST_PAGE
    prepared: list[float] = []
    touched: list[float] = []
    for _ in range(bench.rounds):
        with contextlib.ExitStack() as stack:
            backing = "thp" if "huge" in means else "memfd"
            x = bench.guest(room=size + HUGE_SIZE, backing=backing, prefault=means == "--prefault")
            if x.config.prefault:
                stack.enter_context(x.setting(settings.SHMEM_ENABLED, "advise"))
            stack.enter_context(x)
            whole = x.config.memory // HOST_PAGE if x.config.prefault else pages
            area = x.page(pages, align=HUGE_SIZE)
            if means in UNPREPARED:
                prepared.append(0.0)
            else:
                with bench.stopwatch(prepared, per=whole):
                    _prepare(bench, x, area, size)
            scale = Ticks(x, 1).scale
            done = x.guest.start_touch(area, pages, access=Access.WRITE).result(bench.seconds)
            touched.append(done.ticks * scale / pages)
    bench.keep("prepare", [[each] for each in prepared], clock="host")
    bench.keep("touch", [[each] for each in touched])
    bench.keep("together", [[sum(each)] for each in zip(prepared, touched, strict=True)], clock="host and guest")


def _prepare(bench: Bench, x: Experiment, area: Gpa, size: int) -> None:
    """Prepare the memory, by the point's means."""
    if x.config.prefault:
        x.machine.prefault()
    elif bench["means"] == "allocate":
        file, offset = raw.place(x, area)
        if (answer := raw.allocate(file.fd, offset, size)) != "ok":
            bench.cannot(f"fallocate(2): {answer}")
    else:
        x.memory.populate(area, size)
