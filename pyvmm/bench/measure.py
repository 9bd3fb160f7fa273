# SPDX-License-Identifier: Apache-2.0
"""The tools of a case: a guest at one point of the case's axes, clocks, and result series.

Every case repeats in rounds. Each round has unused memory, or a new guest. The values of the first round are warm-up
(the payload's own pages, the kernel's caches). Owns the series until the runner takes them.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from pyvmm._native import lib
from pyvmm.bench.history import FIRST, SPARE, settle
from pyvmm.bench.model import ROUNDS, Point, Series, Value
from pyvmm.errors import GuestMemoryError, PyvmmError
from pyvmm.experiment import Experiment
from pyvmm.experiment.environment import INSTRUCTIONS, counts
from pyvmm.guest.puppet import Puppet
from pyvmm.memory.address import MIB, Gpa, align_up
from pyvmm.pages import HOST_PAGE
from pyvmm.protection import Protection

RULE = "the first round"


class Unavailable(PyvmmError):
    """The point cannot be measured here. The message has the reason, in the kernel's words if it refused."""


class Bench:
    """One ``point`` of a ``case`` during its measurement. ``bench["backing"]`` is its value on an axis.

    The case repeats in ``rounds``. Its process is killed after ``seconds``. ``new`` tells that no protected VM was
    made since the host's boot.
    """

    def __init__(
        self, case: str, point: Point, *, rounds: int = ROUNDS, seconds: float = 60.0, new: bool = False
    ) -> None:
        self.case, self.point, self.rounds, self.seconds, self.new = case, point, rounds, seconds, new
        self._settled, self._unsettled = 0, ""
        self.series: list[Series] = []
        self.unit = "instructions" if counts() == INSTRUCTIONS else "ns"
        """The unit of times: with icount a nanosecond of the machine's time is an instruction."""

    def __getitem__(self, axis: str) -> Any:
        return self.point[axis]

    @property
    def protection(self) -> Protection:
        """The protection of this point."""
        return Protection(self.point["protection"])

    def guest(self, *, room: int = 0, cpus: int = 1, backing: str = "", **options: Any) -> Experiment:
        """Return a guest, to be entered, of this point's protection, with ``room`` bytes to access.

        ``backing`` is the point's unless given. ``options`` are those of Experiment. The first guest with room settles
        the host's pages before (:mod:`pyvmm.bench.history`), unless the point's ``history`` is FIRST. Raises
        Unavailable if this host has fewer CPUs than ``cpus``, or cannot have that history.
        """
        if cpus > (here := len(os.sched_getaffinity(0))):
            self.cannot(f"{cpus} vCPUs at once need as many CPUs, and here are {here}: pyvmm --lab --lab-cpus {cpus} …")
        self._settle(room)
        memory = align_up(room + SPARE, 2 * MIB) // MIB
        backing = backing or str(self.point.get("backing", "memfd"))
        return Experiment(self.protection, backing, memory=memory, cpus=cpus, **options)

    def _settle(self, room: int) -> None:
        if self.point.get("history") == FIRST:
            if not self.new:
                self.cannot(
                    "it is not the first protected VM since the host's boot: measure this point alone, in a lab or "
                    "after a boot"
                )
        elif room > self._settled:
            self._unsettled = settle(room, seconds=self.seconds)
            self._settled = room

    def cannot(self, why: str) -> NoReturn:
        """End the measurement of this point. Raises Unavailable, always."""
        raise Unavailable(why)

    # -- what it leaves

    def keep(
        self,
        metric: str,
        rounds: Sequence[Sequence[float]],
        *,
        clock: str = "guest",
        unit: str | None = None,
        per: str = "page",
        places: Sequence[int] = (),
        began: Sequence[float] = (),
        **notes: Value,
    ) -> None:
        """Keep a series called ``metric``. The first of several ``rounds``, each a list of values, is warm-up.

        Values are in ``unit``, by default this bench's, each for one ``per``. ``clock`` names what measured them,
        such as guest, host, kvm or el2. ``places``, ``began`` and ``notes`` are those of
        :class:`~pyvmm.bench.model.Series`.
        """
        lengths = tuple(len(each) for each in rounds)
        warm = len(rounds) > 1
        if self._unsettled:
            notes["not settled"] = self._unsettled
        self.series.append(
            Series(
                self.case,
                self.point,
                metric,
                clock,
                unit or self.unit,
                per,
                tuple(round(value, 3) for each in rounds for value in each),
                warmup=lengths[0] if warm else 0,
                rule=RULE if warm else "",
                rounds=lengths,
                places=tuple(places),
                began=tuple(round(value, 1) for value in began),
                notes=dict(notes),
            )
        )

    @contextlib.contextmanager
    def stopwatch(self, into: list[float], *, per: int = 1) -> Iterator[None]:
        """Append to ``into`` the ns of CLOCK_MONOTONIC that the block takes, divided by ``per``."""
        begun = time.monotonic_ns()
        yield
        into.append((time.monotonic_ns() - begun) / per)


class Ticks:
    """Memory in which a guest records the time of each access. Read by the host, or else through the guest."""

    def __init__(self, x: Experiment, entries: int, guest: Puppet | None = None) -> None:
        self._x, self._guest = x, guest or x.guest
        self.scale = 1e9 / x.guest.ping().hz
        """ns in a tick."""
        pages = align_up(entries * 8, HOST_PAGE) // HOST_PAGE
        self.gpa: Gpa = x.page(pages)
        x.guest.fill(self.gpa, pages * HOST_PAGE)
        x.guest.share(self.gpa, pages)

    def read(self, size: int) -> bytes:
        """Return the first ``size`` bytes of it."""
        try:
            return bytes(self._x.memory.read(self.gpa, size))
        except GuestMemoryError:
            words = align_up(size, 8) // 8
            return struct.pack(f"<{words}Q", *self._guest.words(self.gpa, words))[:size]

    def each(self, count: int) -> list[float]:
        """Return a series' recorded times, in ns."""
        return [ticks * self.scale for ticks in struct.unpack_from(f"<{count}I", self.read(4 * count))]


class Exits:
    """KVM's count of a guest's exits, including those that the kernel handled.

    The exits of orders are excluded: the loop counts each access to the mailbox.
    """

    def __init__(self, x: Experiment) -> None:
        self._machine = x.machine
        self._begun = 0

    def begin(self) -> None:
        """Count from here on."""
        self._begun = self._count()

    def end(self) -> int:
        """Return the number of exits since then."""
        return self._count() - self._begun

    def _count(self) -> int:
        total = 0
        for vcpu, native in zip(self._machine.vcpus, self._machine.natives, strict=True):
            exits = vcpu.stats()["exits"]
            total += exits if isinstance(exits, int) else sum(exits)
            total -= native.stats[lib.PV_EXIT_MMIO_MAILBOX].count
        return total
