# SPDX-License-Identifier: Apache-2.0
"""What a Linux guest's disk and network card cost it: throughput and latency, in every protection."""

from __future__ import annotations

from pyvmm.bench import transfers
from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench
from pyvmm.guest.kernels import OWN
from pyvmm.protection import PROTECTIONS


@case(
    says="a Linux guest that reads or writes a disk past its cache, a MiB or 4 KiB at a time, receives or sends a"
    " stream through a tap, or pings: time by the guest's clock, of 10 ms, a pass of 64 MiB or 4,096 requests",
    axes={"protection": PROTECTIONS, "operation": tuple(transfers.OPERATIONS)},
    quick=None,
    seconds=600.0,
    kernel=OWN,
)
def virtio(bench: Bench) -> None:
    """Boot one guest, which does the operation once a round."""
    operation = transfers.OPERATIONS[bench["operation"]]
    with transfers.host() as here:
        if operation.device == "net":
            here.serve()
        argv = transfers.pyvmm(here, operation, bench["protection"], bench.rounds)
        took = transfers.passes(argv, operation, bench.seconds)
    bench.keep(bench["operation"], [[each] for each in took], clock="guest", per=operation.per)
