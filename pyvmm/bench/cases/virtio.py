# SPDX-License-Identifier: Apache-2.0
"""Throughput and latency of a Linux guest's disk and network card, in every protection."""

from __future__ import annotations

from typing import Any

from pyvmm.bench import transfers
from pyvmm.bench.case import case
from pyvmm.bench.measure import Bench
from pyvmm.guest.kernels import OWN
from pyvmm.protection import PROTECTIONS


@case(
    says="a Linux guest that reads or writes a disk past its cache, a MiB or 4 KiB at a time, receives or sends a"
    " stream through a tap, or pings: time by the guest's clock, of 10 ms, a pass of 64 MiB or 4,096 requests; the"
    " kernel takes its kicks (KVM_IOEVENTFD), or pyvmm's loop does, as on a kernel that cannot",
    axes={"protection": PROTECTIONS, "operation": tuple(transfers.OPERATIONS), "kicks": ("kernel", "loop")},
    quick=None,
    seconds=600.0,
    kernel=OWN,
)
def virtio(bench: Bench) -> None:
    """Boot one guest, which runs the operation once per round."""
    operation = transfers.OPERATIONS[bench["operation"]]
    with transfers.host(lacking="KVM_CAP_IOEVENTFD" if bench["kicks"] == "loop" else "") as here:
        if operation.device == "net":
            here.serve()
        argv = transfers.pyvmm(here, operation, bench["protection"], bench.rounds)
        done = transfers.passes(argv, operation, bench.seconds)
    notes: dict[str, Any] = {"kicks without an exit": done.kicks, "exits to doorbells": done.rings}
    bench.keep(bench["operation"], [[each] for each in done.took], clock="guest", per=operation.per, **notes)
