# SPDX-License-Identifier: Apache-2.0
"""Add guest RAM as configured: with which backing, and how much of it is loadable."""

from __future__ import annotations

import contextlib

from pyvmm.errors import HostError
from pyvmm.machine import layout
from pyvmm.memory.address import MIB, Gpa
from pyvmm.memory.backing import Anonymous, Backing, Memfd, PrivateGuestMemfd, SharedGuestMemfd
from pyvmm.pages import HUGE_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm
    from pyvmm.machine.config import MachineConfig
    from pyvmm.memory.memory import Memory


class _PlannedHugePages(Memfd):
    """A plan's substitute for a memfd of huge pages. It takes none of the host's, which may be too few."""

    kind = f"memfd of {HUGE_SIZE // MIB} MiB pages"


def add_ram(memory: Memory, vm: Vm, config: MachineConfig) -> int:
    """Add RAM's slots to ``memory``. Returns the number of loadable bytes from its start. Raises as add() does."""
    base = Gpa(layout.RAM_BASE)
    memory.check_usable(
        f"the {config.backing} backing",
        guest_memfd=config.backing in ("guest_memfd", "private"),
        huge=config.backing == "hugetlb",
    )
    if config.backing == "private":
        rest = config.memory - layout.PRIVATE_BOOT
        memory.add(base, Memfd(layout.PRIVATE_BOOT))
        memory.add(Gpa(base + layout.PRIVATE_BOOT), PrivateGuestMemfd(vm, rest))
        return layout.PRIVATE_BOOT
    memory.add(base, _backing(vm, config))
    return config.memory


def _backing(vm: Vm, config: MachineConfig) -> Backing:
    size = config.memory
    match config.backing:
        case "anonymous":
            return Anonymous(size)
        case "thp":
            return Memfd(size, thp=True)
        case "memfd" if config.prefault:
            # With huge pages, populating costs an eighth (pyvmm bench prefault). The host may ignore this advice, so a
            # kernel that does not know it is not an error.
            with contextlib.suppress(HostError):
                return Memfd(size, thp=True)
            return Memfd(size)
        case "hugetlb" if vm.kernel.pretends:
            return _PlannedHugePages(size)
        case "hugetlb":
            return Memfd(size, hugetlb=True)
        case "guest_memfd":
            return SharedGuestMemfd(vm, size)
        case _:
            return Memfd(size)
