# SPDX-License-Identifier: Apache-2.0
"""An experiment's records: observed and wanted values, page maps, events, and failures of KVM_RUN.

Plain values. The experiment makes them, an atlas keeps them.
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
"""An observed value: a bool, a number, or text (bytes in hex, addresses as 0x8000_0000)."""

TCG = "tcg"
"""The field of a host's description that is true under QEMU's TCG, where times are only relative."""

_OLD_NAMES = {"emulated": TCG}

V = TypeVar("V")

Runs = list[tuple[int, int, int]]
"""A page map: (gpa, pages, ledger entry) of each run of equal pages, sorted; see pyvmm.observe.pagemap."""


def renamed(host: Mapping[str, V]) -> dict[str, V]:
    """Convert a host's description of format 1, of an atlas or a benchmark, to the current field names."""
    return {_OLD_NAMES.get(name, name): value for name, value in host.items()}


class Verdict(Enum):
    """The result of a claim on this host."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNTOLD = "cannot be told"
    """The claim cannot be tested on this host, or not now. The reason is recorded."""
    CRASHED = "crashed"
    """The experiment's process died, or was killed at its deadline."""

    @property
    def mark(self) -> str:
        """One character, legible without colour."""
        return {"holds": "✓", "does not hold": "✗", "cannot be told": "?", "crashed": "!"}[self.value]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One observation. With ``wanted``, the verdict depends on ``saw`` being equal to it."""

    what: str
    saw: Value
    wanted: Value | None = None

    @property
    def ok(self) -> bool | None:
        """Whether it has the wanted value; None without one."""
        return None if self.wanted is None else self.saw == self.wanted


@dataclass(frozen=True, slots=True)
class Picture:
    """The page map at one step of an experiment."""

    title: str
    runs: Runs


@dataclass(frozen=True, slots=True)
class Event:
    """An event of guest memory. ``kind`` is fault, share, unshare, punch, convert or slot.

    ``order`` counts the experiment's events from 0. The result's ``times`` has their times.
    """

    order: int
    kind: str
    gpa: int
    pages: int


@dataclass(frozen=True, slots=True)
class RunFailure:
    """A KVM_RUN that returned -1; ``gpa``, ``size`` and ``flags`` are only valid with KVM_EXIT_MEMORY_FAULT (39)."""

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
