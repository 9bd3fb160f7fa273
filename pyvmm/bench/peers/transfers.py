# SPDX-License-Identifier: Apache-2.0
"""A disk and a card beside QEMU's with KVM: the same kernel, initramfs, file and tap, by turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pyvmm.bench import transfers
from pyvmm.bench.model import Point, Series
from pyvmm.bench.peers import OWN, TURNS, pair, patience
from pyvmm.bench.peers.qemu import qemu

NAME: Final = "qemu virtio"
PASSES: Final = 4
"""Of a guest; the first is not counted."""


def virtio(
    operations: Sequence[str] = tuple(transfers.OPERATIONS), *, turns: int = TURNS, passes: int = PASSES
) -> list[Series]:
    """Boot a guest a turn and operation, who begins alternating."""
    program = qemu()
    series: list[Series] = []
    with transfers.host() as here:
        here.serve()
        for name in operations:
            operation = transfers.OPERATIONS[name]
            sides = {
                "qemu": transfers.qemu(program, here, operation, passes),
                OWN: transfers.pyvmm(here, operation, "none", passes),
            }
            found: dict[str, list[list[float]]] = {side: [] for side in sides}
            for turn in range(turns):
                for side in list(sides) if turn % 2 else reversed(sides):
                    took = transfers.passes(sides[side], operation, patience()).took
                    found[side].append([statistics.median(took[1:])])
            what: Point = {"what": name}
            series += pair(NAME, what, name, found[OWN], found["qemu"], clocks=("guest", "guest"), per=operation.per)
    return series


PEERS: Final[Mapping[str, Callable[..., list[Series]]]] = {NAME: virtio}
