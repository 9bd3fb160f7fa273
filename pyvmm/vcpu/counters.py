# SPDX-License-Identifier: Apache-2.0
"""Read the native loop's counters of all vCPUs, as numbers and as the line that ends every run.

A virtqueue kick that the kernel handles makes no exit, so the device that it reaches counts it.
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
    """One class of exits, over all vCPUs. Nanoseconds are 0 if the run was not timed."""

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
    """CLOCK_MONOTONIC time (ns) of the first vCPU's first entry; 0 before."""
    kicks: int = 0
    """Virtqueue kicks without an exit."""

    @classmethod
    def read(
        cls, vm: pv_vm, vcpus: Sequence[pv_vcpu], elapsed_ns: int, started_ns: int = 0, *, kicks: int = 0
    ) -> Counters:
        """Add up ``struct pv_vcpu.stats``. The vCPUs may be running."""
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
        """Return one line: exits by kind, kicks without an exit, conversions, and the elapsed time."""
        kinds = sorted((e for e in self.exits if e.count), key=lambda e: -e.count)
        parts = ", ".join(f"{e.name} {e.count}" for e in kinds) or "none"
        text = f"{self.total} exit{'' if self.total == 1 else 's'} in {self.elapsed_ns / 1e9:.3f} s: {parts}"
        if self.kicks:
            text += f"; {self.kicks} kick{'' if self.kicks == 1 else 's'} without an exit"
        if self.shares or self.unshares or self.refused:
            text += f"; {self.shares} shared, {self.unshares} unshared, {self.refused} refused"
        return text
