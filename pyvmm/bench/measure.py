# SPDX-License-Identifier: Apache-2.0
"""What a case measures with: a guest at one point of the case's axes, clocks, and the series it leaves.

Every case goes round and round: a round has memory that nothing has touched, or a guest of its own, and the values of
the first are warm-up (the payload's own pages, the kernel's caches). Owns the series until the runner takes them.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from pyvmm._native import lib
from pyvmm.bench.model import Point, Series, Value
from pyvmm.errors import GuestMemoryError, PyvmmError
from pyvmm.experiment import Experiment
from pyvmm.experiment.environment import INSTRUCTIONS, counts
from pyvmm.guest.puppet import Puppet
from pyvmm.memory.address import MIB, PAGE_SIZE, Gpa, align_up
from pyvmm.memory.backing import Memfd
from pyvmm.protection import Protection

ROUNDS = 7
"""Of every case: one that warms up and six that count, the fewest from which a median's interval can be told."""
RULE = "the first round"
SPARE = 12 * MIB
"""Of a guest's memory that cases leave alone: the payload, the device tree, what ticks are left in."""


class Unavailable(PyvmmError):
    """What was to be measured cannot be here: the message says why, in the kernel's own words where it refused."""


class Bench:
    """One point of a case while it is measured: ``bench["backing"]`` is where on an axis it is."""

    def __init__(self, case: str, point: Point, *, rounds: int = ROUNDS, seconds: float = 60.0) -> None:
        self.case, self.point, self.rounds, self.seconds = case, point, rounds, seconds
        self.series: list[Series] = []
        self.unit = "instructions" if counts() == INSTRUCTIONS else "ns"
        """Of times: with icount a nanosecond of the machine's time is an instruction."""

    def __getitem__(self, axis: str) -> Any:
        return self.point[axis]

    @property
    def protection(self) -> Protection:
        """The protection of this point."""
        return Protection(self.point["protection"])

    def guest(self, *, room: int = 0, cpus: int = 1, backing: str = "", **options: Any) -> Experiment:
        """Return a guest, to be entered, of this point's protection and backing, with ``room`` bytes to touch."""
        if cpus > (here := len(os.sched_getaffinity(0))):
            self.cannot(f"{cpus} vCPUs at once need as many CPUs, and here are {here}: pyvmm --lab --lab-cpus {cpus} …")
        memory = align_up(room + SPARE, 2 * MIB) // MIB
        backing = backing or str(self.point.get("backing", "memfd"))
        return Experiment(self.protection, backing, memory=memory, cpus=cpus, **options)

    def recycle(self, size: int) -> None:
        """Have the host touch ``size`` bytes and more of its memory, and give them back: the guest's come from there.

        A pKVM host's first touch of a page since boot faults to EL2 itself (host_abort). That is the page's history,
        nothing of the guest's, and without this it is chance how many pages it falls on.
        """
        with Memfd(align_up(2 * size, PAGE_SIZE)) as file:
            file.populate(0, file.size)

    def cannot(self, why: str) -> NoReturn:
        """End the measurement of this point."""
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
        """Keep a series; values are ns unless ``unit`` says otherwise, the first of several rounds is warm-up."""
        lengths = tuple(len(each) for each in rounds)
        warm = len(rounds) > 1
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
        """Append the ns of CLOCK_MONOTONIC that the block takes, divided by ``per``."""
        begun = time.monotonic_ns()
        yield
        into.append((time.monotonic_ns() - begun) / per)


class Ticks:
    """Memory in which a guest leaves what each access took; read by the host, or through the guest where it may not."""

    def __init__(self, x: Experiment, entries: int, guest: Puppet | None = None) -> None:
        self._x, self._guest = x, guest or x.guest
        self.scale = 1e9 / x.guest.ping().hz
        """ns in a tick."""
        pages = align_up(entries * 8, PAGE_SIZE) // PAGE_SIZE
        self.gpa: Gpa = x.page(pages)
        x.guest.fill(self.gpa, pages * PAGE_SIZE)
        x.guest.share(self.gpa, pages)

    def read(self, size: int) -> bytes:
        """Return the first ``size`` bytes of it."""
        try:
            return bytes(self._x.memory.read(self.gpa, size))
        except GuestMemoryError:
            words = align_up(size, 8) // 8
            return struct.pack(f"<{words}Q", *self._guest.words(self.gpa, words))[:size]

    def each(self, count: int) -> list[float]:
        """Return what a series left, in ns."""
        return [ticks * self.scale for ticks in struct.unpack_from(f"<{count}I", self.read(4 * count))]


class Exits:
    """KVM's own count of a guest's exits, those that it handled without us among them.

    What an order costs by itself is not in it: the loop counts the words that go through the mailbox one by one.
    """

    def __init__(self, x: Experiment) -> None:
        self._machine = x.machine
        self._begun = 0

    def begin(self) -> None:
        """Count from here on."""
        self._begun = self._count()

    def end(self) -> int:
        """Return how many exits there were since."""
        return self._count() - self._begun

    def _count(self) -> int:
        total = 0
        for vcpu, native in zip(self._machine.vcpus, self._machine.natives, strict=True):
            exits = vcpu.stats()["exits"]
            total += exits if isinstance(exits, int) else sum(exits)
            total -= native.stats[lib.PV_EXIT_MMIO_MAILBOX].count
        return total
