# SPDX-License-Identifier: Apache-2.0
"""What pyvmm is measured against in the same run: a bare loop, its Python twin, the kernel's selftests, QEMU.

Each peer takes turns with pyvmm doing the same, and leaves the series of both: case ``peer``, told apart by the axis
``peer``; pyvmm's own are ``pyvmm``, ``beside`` the other. Their notes have the ratio: of what a turn of pyvmm's took to
what the other's did in the same turn, the median of all turns but the first. What only a peer can has no ``beside``.

What a peer needs and pyvmm does not bring is built on the workstation by :func:`pyvmm.lab.peers.prepare`, which also
says how a lab gets to see it. Owns nothing.
"""

from __future__ import annotations

import importlib
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from pyvmm.bench.measure import Bench
from pyvmm.bench.model import Point, Series, Value
from pyvmm.errors import PyvmmError
from pyvmm.experiment.environment import INSTRUCTIONS, counts

CASE: Final = "peer"
OWN: Final = "pyvmm"
TURNS: Final = 7
"""Of a peer and of pyvmm: one that warms up and six that count."""

PATIENCE: Final = 300.0

_MODULES: Final = {
    "demand_paging_test": "fault_in",
    "access_tracking_perf_test": "selftests",
    "guest_memfd_test": "selftests",
    "qemu": "qemu",
    "qemu boot": "boot",
    "qemu virtio": "transfers",
    "bare loop": "loops",
    "twin": "loops",
}


def measure(name: str, **how: Any) -> list[Series]:
    """Measure a peer and pyvmm by turns; one series without values says why, where that cannot be done here.

    ``how`` is what that peer's own function takes, to do less than it does by itself.
    """
    if platform.machine() != "aarch64":
        return [missing(name, f"peers are arm64 programs, and this is {platform.machine()}: see pyvmm --lab")]
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    function: Callable[..., list[Series]] = module.PEERS[name]
    try:
        return function(**how)
    except (PyvmmError, OSError) as error:
        return [missing(name, str(error))]


PEERS: Final[Mapping[str, Callable[..., list[Series]]]] = {name: partial(measure, name) for name in _MODULES}
"""Every peer by name; each measures by turns with pyvmm, in this process, which must have no other threads."""


def patience() -> float | None:
    """Return the seconds that a peer's process may take.

    None where time counts instructions: it flies past there while the host waits, for a file of the workstation's say.
    """
    return None if counts() == INSTRUCTIONS else PATIENCE


def missing(name: str, why: str) -> Series:
    """Return the series of a peer that is not there."""
    return Series(CASE, {"peer": name}, "cost", "host", "ns", "turn", unavailable=why)


def kept(
    point: Point, metric: str, turns: Sequence[Sequence[float]], *, clock: str, per: str, **notes: Value
) -> Series:
    """Return a series of times in ns, in the unit that this host's time has."""
    bench = Bench(CASE, point)
    bench.keep(metric, turns, clock=clock, per=per)
    return replace(bench.series[0], notes=notes)


def pair(
    name: str,
    what: Point,
    metric: str,
    own: Sequence[Sequence[float]],
    other: Sequence[Sequence[float]],
    *,
    clocks: tuple[str, str],
    per: str,
    **notes: Value,
) -> list[Series]:
    """Return the series of a peer and of pyvmm beside it, whose clocks are named in this order, the ratio with them."""
    point: Point = {**what, "beside": name}
    told: dict[str, Value] = {**notes, f"ratio to {name}": ratio(own, other)}
    return [
        kept({**point, "peer": name}, metric, other, clock=clocks[0], per=per, **notes),
        kept({**point, "peer": OWN}, metric, own, clock=clocks[1], per=per, **told),
    ]


def ratio(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Return how much more pyvmm's turns took than the other's, the median over the turns that count."""
    pairs = [(statistics.median(a), statistics.median(b)) for a, b in zip(own, other, strict=True)]
    return round(statistics.median(a / b for a, b in (pairs[1:] or pairs)), 4)
