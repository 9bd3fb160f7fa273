# SPDX-License-Identifier: Apache-2.0
"""What a machine is to be: plain values, checked together before anything is opened."""

from __future__ import annotations

import threading

from pyvmm.devices.kind import DeviceSpec
from pyvmm.errors import OptionError, hex_
from pyvmm.machine import layout
from pyvmm.memory.address import HUGE_SIZE, MIB
from pyvmm.memory.choices import BACKINGS, DEFAULT_MEMORY, ConversionPolicy
from pyvmm.protection import Protection
from pyvmm.typed import NamedTuple


def usual_backing(protection: Protection) -> str:
    """Return what a guest's memory is unless somebody chooses: what is cheapest to touch first.

    The emulated protection needs memory that can be mapped twice.
    """
    return "memfd" if protection is Protection.EMULATED else "anonymous"


class MachineConfig(NamedTuple):
    """Everything :class:`pyvmm.machine.machine.Machine` needs to know.

    ``kernel`` is a path or ``payload:NAME``; ``memory`` is bytes of RAM; ``params`` are joined by spaces into the
    guest's command line; ``deadline`` is seconds from the first run; ``serial_out`` and ``serial_in`` are descriptors
    or None; ``timed`` keeps histograms of the time in guest and VMM; ``prefault`` populates all memory before the first
    run, in huge pages where the host gives them: a first touch then costs what the protection asks, and no more;
    ``devices`` are those beside the machine's own, in the order of their addresses (:mod:`pyvmm.devices.kinds`);
    ``swiotlb`` is bytes of the pool through which the guest copies what they read and write: None for what the
    protection needs, 0 for no pool; ``dtb`` is the path of a device tree to be used as it is, in place of the one that
    describes the machine; devices are then told of its pool.
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

    def check(self) -> None:
        """Raise OptionError for values that no machine can have, or that make no sense together.

        It names the options of a command line that such values come from.
        """
        if not 1 <= self.cpus <= layout.MAX_VCPUS:
            raise OptionError(f"{self.cpus} vCPUs: a machine has 1 to {layout.MAX_VCPUS}", "cpus")
        if self.memory % MIB or self.memory < layout.RAM_MINIMUM:
            raise OptionError(
                f"{self.memory} bytes of memory: whole MiB are needed, {layout.RAM_MINIMUM // MIB} at least",
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
                f"parameters for a guest with a device tree of its own, {self.dtb}: that is taken as it is",
                "params",
                "dtb",
                hint="write them into its /chosen/bootargs",
            )
        if self.dtb is not None and self.swiotlb is not None:
            raise OptionError(
                f"a DMA pool of {self.swiotlb // MIB} MiB for a guest with a device tree of its own, "
                f"{self.dtb}: that is taken as it is",
                "swiotlb",
                "dtb",
                hint="write the pool into its /reserved-memory",
            )
        if self.backing not in BACKINGS:
            raise OptionError(f"no backing is called {self.backing!r}; there are {', '.join(BACKINGS)}", "backing")
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
        if self.deadline is not None and not 0 < self.deadline <= threading.TIMEOUT_MAX:
            most = f"{threading.TIMEOUT_MAX:.0f}"
            raise OptionError(
                f"a deadline of {self.deadline} seconds: it must be more than 0, and {most} at most", "deadline"
            )
        if self.backing == "anonymous" and self.protection is Protection.EMULATED:
            raise OptionError(
                "the anonymous backing with protection emulated: a private page is closed to the host in a second "
                "mapping of guest memory, and this memory cannot have one",
                "backing",
                "protection",
                hint="use a memfd, the default there",
            )
        if self.backing == "private" and self.memory <= layout.PRIVATE_BOOT:
            raise OptionError(
                f"{self.memory // MIB} MiB of memory with the private backing: the first "
                f"{layout.PRIVATE_BOOT // MIB} MiB are a memfd, for what is loaded, so more than that is needed",
                "mem",
                "backing",
            )
        if (
            self.backing == "private"
            and self.protection is Protection.EMULATED
            and self.conversion is not ConversionPolicy.COPY
        ):
            raise OptionError(
                f"the private backing with conversion policy {self.conversion.name.lower()}: the host cannot touch "
                "these pages even when the guest shares them",
                "backing",
                "protection",
                "conversion",
                hint="use --conversion copy, which puts a shared page into a memfd",
            )
        if self.conversion is not ConversionPolicy.PRESERVE and self.protection is not Protection.EMULATED:
            raise OptionError(
                f"conversion policy {self.conversion.name.lower()} with protection {self.protection.value}: only the "
                "emulated protection's conversions are the VMM's to decide",
                "conversion",
                "protection",
            )

    def pool_size(self, tree: bytes | None = None, *, virtio: bool = False) -> int:
        """Return the bytes of the guest's DMA pool, 0 for none. The guest's own device ``tree`` says its size itself.

        ``virtio`` says that a virtio device is there which is not among ``devices``.

        Raises UsageError for a tree that cannot be read.
        """
        virtio = virtio or any(device.virtio for device in self.devices)
        if self.swiotlb is not None and tree is None:
            return self.swiotlb
        if not virtio or (tree is None and not self.protection.isolates):
            return 0
        from pyvmm.machine.swiotlb import pool_in, usual_pool

        return usual_pool(self.memory) if tree is None else pool_in(tree, f"device tree {self.dtb}")
