# SPDX-License-Identifier: Apache-2.0
"""What the native loop has counted of all vCPUs, as plain numbers and as the line that ends every run.

A kick of a virtqueue that the kernel takes makes no exit, so it is counted apart, by the device that it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm._native import lib
from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm._native import pv_vcpu, pv_vm

EXITS = {
    getattr(lib, f"PV_EXIT_{name}"): label
    for name, label in {
        "MMIO_COLD": "mmio-python",
        "MMIO_REGISTERS": "mmio-registers",
        "MMIO_COUNTER": "mmio-counter",
        "MMIO_DOORBELL": "mmio-doorbell",
        "MMIO_PL011": "uart",
        "MMIO_MAILBOX": "mailbox",
        "MMIO_SHARE": "share-bell",
        "MMIO_VIRTIO": "virtio",
        "MMIO_UNCLAIMED": "unclaimed",
        "HYPERCALL": "hypercall",
        "SYSTEM": "system",
        "DEBUG": "debug",
        "INTR": "interrupted",
        "FAILED": "failed",
        "OTHER": "other",
    }.items()
}


class ExitCount:
    """One class of exits, over all vCPUs; nanoseconds are 0 where the run was not timed."""

    __slots__ = ("count", "guest_ns", "name", "vmm_ns")

    def __init__(self, name: str, count: int, guest_ns: int, vmm_ns: int) -> None:
        self.name = name
        self.count = count
        self.guest_ns = guest_ns
        self.vmm_ns = vmm_ns


class Counters(NamedTuple):
    """A snapshot: exits by class, conversions, and the wall time it covers."""

    exits: tuple[ExitCount, ...]
    shares: int
    unshares: int
    refused: int
    elapsed_ns: int
    started_ns: int = 0
    """When the first vCPU was entered, of CLOCK_MONOTONIC; 0 before."""
    kicks: int = 0
    """Of virtqueues, without an exit."""

    @classmethod
    def read(
        cls, vm: pv_vm, vcpus: Sequence[pv_vcpu], elapsed_ns: int, started_ns: int = 0, *, kicks: int = 0
    ) -> Counters:
        """Add up ``struct pv_vcpu.stats``; the vCPUs may be running."""
        exits = []
        for code, name in EXITS.items():
            stats = [vcpu.stats[code] for vcpu in vcpus]
            exits.append(
                ExitCount(
                    name,
                    sum(s.count for s in stats),
                    sum(s.guest_ns for s in stats),
                    sum(s.vmm_ns for s in stats),
                )
            )
        return cls(tuple(exits), vm.shares, vm.unshares, vm.refused, elapsed_ns, started_ns, kicks)

    @property
    def total(self) -> int:
        """All exits."""
        return sum(exit_.count for exit_ in self.exits)

    def line(self) -> str:
        """One line: how many exits of which kind, how many kicks without one and conversions, how long."""
        kinds = sorted((e for e in self.exits if e.count), key=lambda e: -e.count)
        parts = ", ".join(f"{e.name} {e.count}" for e in kinds) or "none"
        text = f"{self.total} exit{'' if self.total == 1 else 's'} in {self.elapsed_ns / 1e9:.3f} s: {parts}"
        if self.kicks:
            text += f"; {self.kicks} kick{'' if self.kicks == 1 else 's'} without an exit"
        if self.shares or self.unshares or self.refused:
            text += f"; {self.shares} shared, {self.unshares} unshared, {self.refused} refused"
        return text
