# SPDX-License-Identifier: Apache-2.0
"""Compare boots with QEMU/KVM: the same kernel, initramfs, memory and console, from exec to init's word."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Final

from pyvmm.bench import linux
from pyvmm.bench.model import Point, Series
from pyvmm.bench.peers import pair, patience
from pyvmm.bench.peers.qemu import qemu
from pyvmm.guest.kernels import OWN

NAME: Final = "qemu boot"
TURNS: Final = 17
"""More turns than elsewhere: a boot takes seconds, and a busy machine doubles some of them."""


def boots(*, turns: int = TURNS) -> list[Series]:
    """Boot in turns; the first of a turn alternates."""
    qemu()
    times: dict[str, list[list[float]]] = {"qemu": [], "pyvmm": []}
    with linux.files(OWN) as guest, tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        sides = {"qemu": linux.qemu(qemu(folder), guest, 1), "pyvmm": linux.pyvmm(guest, "none", 1)}
        for turn in range(turns):
            for side in list(sides) if turn % 2 else reversed(sides):
                boot = linux.boot(sides[side], patience())
                times[side].append([float(boot.init - boot.executed)])
    point: Point = {"what": "boot", "kernel": OWN}
    return pair(NAME, point, "exec to init", times["pyvmm"], times["qemu"], clocks=("host", "host"), per="boot")


PEERS: Final[Mapping[str, Callable[..., list[Series]]]] = {NAME: boots}
