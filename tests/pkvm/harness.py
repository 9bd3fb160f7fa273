# SPDX-License-Identifier: Apache-2.0
"""What the tests of real guests share: a run with its output, and a live puppet."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyvmm.guest.puppet import Puppet
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.protection import Protection
from pyvmm.vcpu.counters import Counters
from pyvmm.vcpu.outcome import Outcome

DEADLINE = 120.0
ALL = (Protection.NONE, Protection.EMULATED, Protection.PKVM)


@dataclass(frozen=True)
class Run:
    """How a run ended and what the guest printed."""

    outcome: Outcome
    output: bytes
    counters: Counters


def config(kernel: str, protection: Protection, **more: object) -> MachineConfig:
    """Return a small machine with a deadline."""
    base = MachineConfig(kernel, protection, memory=16 << 20, deadline=DEADLINE, serial_out=None)
    return base._replace(**more)  # type: ignore[arg-type]


def run(kernel: str, protection: Protection, **more: object) -> Run:
    """Run ``kernel`` to its end with the console going to a file in memory."""
    out = os.memfd_create("console")
    try:
        with Machine(config(kernel, protection, serial_out=out, **more)) as machine:
            outcome = machine.run()
            counters = machine.counters
        size = os.fstat(out).st_size
        return Run(outcome, os.pread(out, size, 0), counters)
    finally:
        os.close(out)


@contextlib.contextmanager
def puppet(protection: Protection, **more: object) -> Iterator[tuple[Machine, Puppet]]:
    """Start a machine whose guest obeys orders."""
    with Machine(config("payload:puppet", protection, **more)) as machine:
        machine.start()
        try:
            yield machine, Puppet(machine.mailboxes)
        finally:
            machine.stop("the test is over")
            machine.wait(DEADLINE)


@dataclass(frozen=True)
class Footprint:
    """What a process holds of its host. If it differs after a run, something leaked."""

    fds: int
    threads: int
    maps: int
    locked_kib: int
    vms: int

    @classmethod
    def now(cls) -> Footprint:
        """Count what the calling process holds."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _alive(fd)]
        maps = Path("/proc/self/maps").read_text()
        return cls(
            fds=len(fds),
            threads=int(status["Threads"]),
            # Heap and arenas grow with use. A run maps shared memory and KVM's files.
            maps=sum("memfd:" in line or "kvm" in line for line in maps.splitlines()),
            locked_kib=int(status["VmLck"].split()[0]) + int(status["VmPin"].split()[0]),
            vms=sum("kvm-vm" in name for name in fds),
        )


def _alive(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
