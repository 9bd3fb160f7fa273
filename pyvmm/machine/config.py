# SPDX-License-Identifier: Apache-2.0
"""The configuration of a machine: plain values, checked together before anything is opened."""

from __future__ import annotations

import threading

from pyvmm.devices.kind import DeviceSpec
from pyvmm.errors import OptionError, hex_
from pyvmm.machine import layout
from pyvmm.memory.address import MIB
from pyvmm.memory.choices import BACKINGS, DEFAULT_MEMORY, ConversionPolicy
from pyvmm.pages import HUGE_SIZE
from pyvmm.protection import Protection
from pyvmm.typed import NamedTuple


def usual_backing(protection: Protection) -> str:
    """Return the default backing of guest memory: the one with the cheapest first accesses.

    The emulated protection needs memory that can be mapped twice.
    """
    return "memfd" if protection is Protection.EMULATED else "anonymous"


class MachineConfig(NamedTuple):
    """Everything :class:`pyvmm.machine.machine.Machine` needs to know.

    ``kernel`` is a path or ``payload:NAME``; ``memory`` is bytes of RAM; ``params`` are joined by spaces into the
    guest's command line; ``deadline`` is seconds from the first run; ``serial_out`` and ``serial_in`` are descriptors
    or None; ``timed`` keeps histograms of the time in guest and VMM; ``prefault`` populates all memory before the first
    run, with huge pages where the host has them. A first access then costs only what the protection adds. ``devices``
    are those beside the machine's own, in the order of their addresses (:mod:`pyvmm.devices.kinds`). ``swiotlb`` is the
    size in bytes of the DMA pool (bounce buffer) for these devices: None for the protection's default, 0 for no pool.
    ``dtb`` is the path of a device tree that replaces the generated one. Devices then use its pool. ``name`` is what
    the user calls the kernel, where that is not ``kernel``. ``pmu`` gives each vCPU the host's performance
    counters.
    """

    kernel: str
    protection: Protection = Protection.NONE
    memory: int = DEFAULT_MEMORY
    cpus: int = 1
    params: tuple[str, ...] = ()
    initrd: str | None = None
    backing: str = "memfd"
    conversion: ConversionPolicy = ConversionPolicy.PRESERVE
    deadline: float | None = None
    serial_out: int | None = 1
    serial_in: int | None = None
    timed: bool = True
    prefault: bool = False
    devices: tuple[DeviceSpec, ...] = ()
    swiotlb: int | None = None
    dtb: str | None = None
    name: str | None = None
    pmu: bool = False

    @property
    def title(self) -> str:
        """The kernel for a reader: ``name`` if there is one, else ``kernel``."""
        return self.kernel if self.name is None else self.name

    def check(self) -> None:
        """Raise OptionError for invalid or contradicting values.

        The error names the command line options with these values.
        """
        if not 1 <= self.cpus <= layout.MAX_VCPUS:
            raise OptionError(f"{self.cpus} vCPUs: a machine can have 1 to {layout.MAX_VCPUS}", "cpus")
        if self.memory % MIB or self.memory < layout.RAM_MINIMUM:
            raise OptionError(
                f"{self.memory} bytes of memory: use whole MiB, at least {layout.RAM_MINIMUM // MIB}",
                "mem",
            )
        if layout.RAM_BASE + self.memory > layout.RAM_LIMIT:
            raise OptionError(
                f"{self.memory // MIB} MiB of memory end beyond gpa {hex_(layout.RAM_LIMIT)}, "
                "the end of what a guest can address",
                "mem",
            )
        if self.dtb is not None and self.params:
            raise OptionError(
                f"parameters for a guest with its own device tree, {self.dtb}: pyvmm does not change that tree",
                "params",
                "dtb",
                hint="write them into its /chosen/bootargs",
            )
        if self.dtb is not None and self.swiotlb is not None:
            raise OptionError(
                f"a DMA pool of {self.swiotlb // MIB} MiB for a guest with its own device tree, "
                f"{self.dtb}: pyvmm does not change that tree",
                "swiotlb",
                "dtb",
                hint="write the pool into its /reserved-memory",
            )
        if self.backing not in BACKINGS:
            raise OptionError(f"unknown backing {self.backing!r}; use one of {', '.join(BACKINGS)}", "backing")
        if self.backing == "hugetlb" and self.memory % HUGE_SIZE:
            raise OptionError(
                f"{self.memory // MIB} MiB of memory with the hugetlb backing: its pages have "
                f"{HUGE_SIZE // MIB} MiB each",
                "mem",
                "backing",
            )
        if self.swiotlb is not None:
            from pyvmm.machine.swiotlb import check_pool

            check_pool(self.swiotlb, self.memory)
        for device in self.devices:
            device.check(self)
        if self.pmu and self.protection is not Protection.NONE:
            raise OptionError(
                f"a PMU with protection {self.protection.value}: pKVM's hypervisor gives protected guests none",
                "pmu",
                "protection",
                hint="drop --pmu",
            )
        if self.deadline is not None and not 0 < self.deadline <= threading.TIMEOUT_MAX:
            most = f"{threading.TIMEOUT_MAX:.0f}"
            raise OptionError(
                f"a deadline of {self.deadline} seconds: it must be more than 0, and at most {most}", "deadline"
            )
        if self.backing == "anonymous" and self.protection is Protection.EMULATED:
            raise OptionError(
                "the anonymous backing with protection emulated: this protection needs a second mapping of guest "
                "memory, and anonymous memory cannot be mapped twice",
                "backing",
                "protection",
                hint="use a memfd, the default of this protection",
            )
        if self.backing == "private" and self.memory <= layout.PRIVATE_BOOT:
            raise OptionError(
                f"{self.memory // MIB} MiB of memory with the private backing: the first "
                f"{layout.PRIVATE_BOOT // MIB} MiB are a memfd to load the guest into, so it needs more than that",
                "mem",
                "backing",
            )
        if (
            self.backing == "private"
            and self.protection is Protection.EMULATED
            and self.conversion is not ConversionPolicy.COPY
        ):
            raise OptionError(
                f"the private backing with conversion policy {self.conversion.name.lower()}: the host cannot access "
                "these pages even when the guest shares them",
                "backing",
                "protection",
                "conversion",
                hint="use --conversion copy, which puts a shared page into a memfd",
            )
        if self.conversion is not ConversionPolicy.PRESERVE and self.protection is not Protection.EMULATED:
            raise OptionError(
                f"conversion policy {self.conversion.name.lower()} with protection {self.protection.value}: the VMM "
                "controls conversions only under the emulated protection",
                "conversion",
                "protection",
            )

    def pool_size(self, tree: bytes | None = None, *, virtio: bool = False) -> int:
        """Return the size of the guest's DMA pool in bytes, 0 for none. A guest's own ``tree`` contains its size.

        ``virtio`` says whether there is a virtio device that is not in ``devices``.

        Raises UsageError for a tree that cannot be read.
        """
        virtio = virtio or any(device.virtio for device in self.devices)
        if self.swiotlb is not None and tree is None:
            return self.swiotlb
        if not virtio or (tree is None and not self.protection.isolates):
            return 0
        from pyvmm.machine.swiotlb import pool_in, usual_pool

        return usual_pool(self.memory) if tree is None else pool_in(tree, f"device tree {self.dtb}")
