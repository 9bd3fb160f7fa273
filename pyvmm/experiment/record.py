# SPDX-License-Identifier: Apache-2.0
"""What an experiment records: what it saw, what it wanted to see, page maps, events, and how KVM_RUN failed.

Plain values, owns nothing; the experiment makes them, an atlas keeps them.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from pyvmm.uapi.errno import EHWPOISON
from pyvmm.uapi.kvm_run import ExitReason

Value = bool | int | str
"""What was seen: a truth, a number, or text (bytes are said in hex, addresses as 0x8000_0000)."""

TCG = "tcg"
"""The field of a host's description that is true where QEMU's TCG runs it, so that its times are relative only."""

_OLD_NAMES = {"emulated": TCG}

V = TypeVar("V")

Runs = list[tuple[int, int, int]]
"""A page map: (gpa, pages, ledger entry) of each run of equal pages, sorted; see pyvmm.observe.pagemap."""


def renamed(host: Mapping[str, V]) -> dict[str, V]:
    """Return a host's description of format 1, of an atlas or a benchmark, with the names that its fields have now."""
    return {_OLD_NAMES.get(name, name): value for name, value in host.items()}


class Verdict(Enum):
    """What became of a claim on this host."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNTOLD = "cannot be told"
    """Not on this host, or not now: the reason says why."""
    CRASHED = "crashed"
    """The process that ran the experiment died, or was past its deadline and killed."""

    @property
    def mark(self) -> str:
        """One character, legible without colour."""
        return {"holds": "✓", "does not hold": "✗", "cannot be told": "?", "crashed": "!"}[self.value]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing seen. With ``wanted`` the claim's verdict hangs on ``saw`` being equal to it."""

    what: str
    saw: Value
    wanted: Value | None = None

    @property
    def ok(self) -> bool | None:
        """Whether it is as the claim says; None for what is only told."""
        return None if self.wanted is None else self.saw == self.wanted


@dataclass(frozen=True, slots=True)
class Picture:
    """The page map at one step of an experiment."""

    title: str
    runs: Runs


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to guest memory: ``kind`` is fault, share, unshare, punch, convert or slot.

    ``order`` counts events of the experiment from 0; when each happened is in the result's ``times``.
    """

    order: int
    kind: str
    gpa: int
    pages: int


@dataclass(frozen=True, slots=True)
class RunFailure:
    """A KVM_RUN that returned -1; ``gpa``, ``size`` and ``flags`` are told with KVM_EXIT_MEMORY_FAULT (39) only."""

    vcpu: int
    errno: int
    exit_reason: int
    gpa: int
    size: int
    flags: int

    @property
    def name(self) -> str:
        """The errno's name."""
        return "EHWPOISON" if self.errno == EHWPOISON else errno.errorcode.get(self.errno, str(self.errno))

    def __str__(self) -> str:
        told = " with KVM_EXIT_MEMORY_FAULT" if self.exit_reason == ExitReason.KVM_EXIT_MEMORY_FAULT else ""
        return self.name + told
