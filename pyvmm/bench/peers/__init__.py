# SPDX-License-Identifier: Apache-2.0
"""Measure peers of pyvmm in the same run: a bare loop, its Python twin, the kernel's selftests, other VMMs.

Each peer and pyvmm do the same work in turns, and both get a series: case ``peer``, with the peer's name on the axis
``peer``. pyvmm's own are ``pyvmm``, with the peer's name on the axis ``beside``. Their notes have the ratio of pyvmm's
time to the peer's in the same turn: the median of all turns except the first. Work that only the peer can do has no
``beside``.

:func:`pyvmm.lab.peers.prepare` builds the peers' programs on the workstation, and makes them visible in a lab. Owns
nothing.
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
"""Turns of a peer and of pyvmm: one for warm-up, and six."""

PATIENCE: Final = 300.0

_MODULES: Final = {
    "demand_paging_test": "fault_in",
    "access_tracking_perf_test": "selftests",
    "guest_memfd_test": "selftests",
    "qemu": "qemu",
    "qemu boot": "boot",
    "kvmtool boot": "boot",
    "qemu virtio": "transfers",
    "bare loop": "loops",
    "twin": "loops",
}


def measure(name: str, **how: Any) -> list[Series]:
    """Measure a peer and pyvmm in turns. If that is impossible here, one series without values has the reason.

    ``how`` are arguments of that peer's function, to reduce the work.
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
"""Every peer by name. Each measures in turns with pyvmm, in this process, which must have no other threads."""


def patience() -> float | None:
    """Return the seconds that a peer's process may take.

    None if time counts instructions: this clock runs ahead while the host waits, for example for a file.
    """
    return None if counts() == INSTRUCTIONS else PATIENCE


def missing(name: str, why: str) -> Series:
    """Return the series of a missing peer."""
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
    """Return the series of a peer and of pyvmm, with their clocks in this order, and the ratio."""
    point: Point = {**what, "beside": name}
    told: dict[str, Value] = {**notes, f"ratio to {name}": ratio(own, other)}
    return [
        kept({**point, "peer": name}, metric, other, clock=clocks[0], per=per, **notes),
        kept({**point, "peer": OWN}, metric, own, clock=clocks[1], per=per, **told),
    ]


def ratio(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Return the ratio of pyvmm's turns to the peer's: the median without the warm-up."""
    pairs = [(statistics.median(a), statistics.median(b)) for a, b in zip(own, other, strict=True)]
    return round(statistics.median(a / b for a, b in (pairs[1:] or pairs)), 4)
