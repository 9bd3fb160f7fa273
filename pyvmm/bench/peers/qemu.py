# SPDX-License-Identifier: Apache-2.0
"""Compare exits with QEMU/KVM: the same payload under both times itself, on each VMM's UART.

``payload:exits`` finds the UART in the device tree. A store and a load there leave the kernel and are answered by the
VMM; a call of PSCI's version is the kernel's own, and so the same under both but for what a VMM leaves behind.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pyvmm import payloads
from pyvmm.bench.model import Series
from pyvmm.bench.peers import OWN, PATIENCE, TURNS, pair, patience
from pyvmm.bench.qemu import command
from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab.programs import QEMU
from pyvmm.lab.trees import find_tree

NAME: Final = "qemu"
COUNT: Final = 1000
ROUNDS: Final = 3
"""Of each kind of exit in a turn, that is in a run of a VMM."""
MEMORY: Final = 128
"""MiB."""
WHAT: Final = {"store": "store to the UART", "load": "load from the UART", "hvc": "PSCI version"}

_LINE = re.compile(r"^exits: what=(\w+) round=\d+ count=(\d+) ticks=(\d+) hz=(\d+)\r?$", re.MULTILINE)


def qemu(folder: str | None = None) -> list[str]:
    """Return the beginning of QEMU's command, that of the tree or else this machine's own. HostError without any.

    With ``folder`` the tree is copied there: onto a file system of the host's own, as what is installed is.
    """
    [program] = QEMU.programs
    if (tree := find_tree(QEMU.name)) is not None:
        return QEMU.command(tree if folder is None else Path(shutil.copytree(tree, Path(folder, "qemu"))))
    if (path := shutil.which(program)) is not None:
        return [path]
    raise HostError(f"there is no {program} here", hint=f"apt install {QEMU.package}, or pyvmm --lab bench --peers")


def theirs() -> dict[str, list[float]]:
    """Run the payload under QEMU; return ns an exit of every round, by kind."""
    parameters = f"count={COUNT} rounds={ROUNDS}"
    return _run(command(qemu(), payloads.path_of("exits"), parameters, memory=MEMORY))


def ours() -> dict[str, list[float]]:
    """Run the payload in a plain guest of pyvmm's; return the same."""
    return _run(
        [
            sys.executable,
            "-P",
            "-m",
            "pyvmm",
            "run",
            "--mem",
            str(MEMORY),
            "-p",
            f"count={COUNT}",
            "-p",
            f"rounds={ROUNDS}",
            "payload:exits",
        ]
    )


def _run(argv: list[str]) -> dict[str, list[float]]:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience(), check=False
        )
    except subprocess.TimeoutExpired:
        raise PyvmmError(f"{' '.join(argv)} did not end within {PATIENCE:.0f} s") from None
    found = parse(done.stdout)
    if done.returncode or any(len(found.get(kind, ())) != ROUNDS for kind in WHAT):
        said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise PyvmmError(f"{' '.join(argv)} ended with status {done.returncode} before the payload did: {said}")
    return found


def parse(said: str) -> dict[str, list[float]]:
    """Return the ns an exit of every round that the payload told, by kind."""
    found: dict[str, list[float]] = {}
    for kind, count, ticks, hz in _LINE.findall(said):
        found.setdefault(kind, []).append(int(ticks) * 1e9 / int(hz) / int(count))
    return found


def exits() -> list[Series]:
    """Measure by turns, who begins alternating."""
    qemu()
    runs: dict[str, list[dict[str, list[float]]]] = {NAME: [], OWN: []}
    for turn in range(TURNS):
        sides: list[tuple[str, Callable[[], dict[str, list[float]]]]] = [(NAME, theirs), (OWN, ours)]
        for side, measured in sides if turn % 2 else reversed(sides):
            runs[side].append(measured())
    series: list[Series] = []
    for kind, what in WHAT.items():
        peer, own = ([run[kind] for run in runs[side]] for side in (NAME, OWN))
        series += pair(NAME, {"what": what}, "exit", own, peer, clocks=("guest", "guest"), per="exit")
    return series


PEERS: Final[Mapping[str, Callable[[], list[Series]]]] = {NAME: exits}
