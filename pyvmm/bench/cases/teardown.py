# SPDX-License-Identifier: Apache-2.0
"""The cost of ending a VM, by its resident memory."""

from __future__ import annotations

import time
from typing import Final

from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench
from pyvmm.guest.orders import Access
from pyvmm.memory.address import MIB
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import PROTECTIONS

SIZES: Final = (1, 4)
"""MiB that the guest has touched."""
LARGE: Final = (16, 64)
SETTLED: Final = 0.1
"""Seconds until the grace periods of the VM's creation are over: its end would also wait for them."""


@case(
    says="a VM's end by the MiB that its guest has touched: first the VM (under pkvm the hypervisor scrubs each page"
    " and hands it back), then the memory; both at once where it is a guest_memfd, which keeps its VM",
    axes={"protection": PROTECTIONS, "size": SIZES, "backing": ("memfd", "thp", "guest_memfd")},
    quick=("size",),
    extra=tuple({"size": size} for size in LARGE),
    seconds=300.0,
)
def teardown(bench: Bench) -> None:
    """Make a guest each round, have it access its memory, and time its end by the host's clock."""
    size = bench["size"] * MIB
    pages = size // HOST_PAGE
    vm: list[float] = []
    memory: list[float] = []
    for _ in range(bench.rounds):
        with bench.guest(room=size) as x:
            x.guest.start_touch(x.page(pages), pages, access=Access.WRITE).result(bench.seconds)
            x.machine.stop("the guest has done its work")
            time.sleep(SETTLED)
            with bench.stopwatch(vm):
                x.end()
            with bench.stopwatch(memory):
                x.close()
    if bench["backing"] == "guest_memfd":  # its last descriptor is the VM's last reference
        both = [sum(each) for each in zip(vm, memory, strict=True)]
        bench.keep("VM and memory", [[value] for value in both], clock="host", per="VM")
        return
    bench.keep("VM", [[value] for value in vm], clock="host", per="VM")
    bench.keep("memory", [[value] for value in memory], clock="host", per="VM")
