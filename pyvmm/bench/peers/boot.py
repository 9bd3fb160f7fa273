# SPDX-License-Identifier: Apache-2.0
"""Compare boots with QEMU's and kvmtool's on KVM: the same kernel, initramfs and memory, from exec to init's word."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from pyvmm.bench import linux
from pyvmm.bench.model import Point, Series
from pyvmm.bench.peers import OWN, pair, patience
from pyvmm.bench.peers.qemu import qemu
from pyvmm.errors import HostError
from pyvmm.guest import kernels
from pyvmm.lab import kvmtool
from pyvmm.lab.programs import BIN
from pyvmm.lab.trees import find_tree

TURNS: Final = 17
"""More turns than elsewhere: a boot takes seconds, and a busy machine doubles some of them."""


def lkvm(folder: str) -> list[str]:
    """Return the beginning of kvmtool's command, copied to ``folder`` from its tree, or this machine's own.

    Raises HostError if neither exists.
    """
    if (tree := find_tree(kvmtool.NAME)) is not None:
        return [shutil.copy(str(tree / BIN / kvmtool.PROGRAM), folder)]
    if (path := shutil.which(kvmtool.PROGRAM)) is not None:
        return [path]
    raise HostError("kvmtool is not here", hint="pyvmm --lab bench --peers builds it")


def boots(name: str, *, turns: int = TURNS) -> list[Series]:
    """Boot in turns; the first of a turn alternates."""
    find, command = SIDES[name]
    times: dict[str, list[list[float]]] = {name: [], OWN: []}
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        program = find(folder)
        with linux.files(kernels.OWN) as guest:
            sides = {name: command(program, guest, 1), OWN: linux.pyvmm(guest, "none", 1)}
            for turn in range(turns):
                for side in list(sides) if turn % 2 else reversed(sides):
                    times[side].append([linux.to_init(sides[side], patience())])
    point: Point = {"what": "boot", "kernel": kernels.OWN}
    return pair(name, point, "exec to init", times[OWN], times[name], clocks=("host", "host"), per="boot")


Find = Callable[[str], list[str]]
"""Gives the beginning of a VMM's command, whose files are copied to a folder."""
Command = Callable[[Sequence[str], linux.Files, int], list[str]]
"""Gives the command that boots a guest with as many CPUs."""

SIDES: Final[Mapping[str, tuple[Find, Command]]] = {
    "qemu boot": (qemu, linux.qemu),
    "kvmtool boot": (lkvm, linux.kvmtool),
}

PEERS: Final[Mapping[str, Callable[..., list[Series]]]] = {name: partial(boots, name) for name in SIDES}
