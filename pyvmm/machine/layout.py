# SPDX-License-Identifier: Apache-2.0
"""The guest's physical address map and its interrupt numbers.

Data only; owns no resource. The machine places devices with it, and the boot protocol places files. Devices and
payloads do not know these addresses. The guest gets them from the device tree.
"""

from __future__ import annotations

from pyvmm.memory.address import MIB
from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#   0x0000_0000 +------------------------------+
#               | nothing: an access exits     |
#   0x0800_0000 +------------------------------+
#               | interrupt controller         |   in the kernel
#   0x0900_0000 +------------------------------+
#               | PL011 UART, PL031 clock      |
#   0x0910_0000 +------------------------------+
#               | share doorbell, echo device  |
#   0x0920_0000 +------------------------------+
#               | mailbox, a page a vCPU       |
#   0x0930_0000 +------------------------------+
#               | bench device                 |
#   0x0a00_0000 +------------------------------+
#               | virtio-mmio                  |   a device every 0x200 bytes
#   0x0a10_0000 +------------------------------+
#               | nothing: an access exits     |
#   0x0b00_0000 +------------------------------+
#               | other devices                |   those of configurations and scripts
#   0x0c00_0000 +------------------------------+
#               | nothing: an access exits,    |
#               | slots may be added on demand |
#   0x8000_0000 +------------------------------+ RAM_BASE
#               | 512 KiB free                 |
#   0x8008_0000 |..............................| RAM_BASE + FLAT_OFFSET
#               | flat binary                  |   a Linux Image: at RAM_BASE + its text_offset
#               |                              |   an ELF: where its program headers say
#               | free                         |
#               |                              |
#               | initrd                       |   ends at or below the device tree, starts on a page
#               |..............................|   2 MiB aligned
#               | device tree, 2 MiB at most   |
#               |..............................|
#               | less than 2 MiB, but for     |   nothing when the RAM's end is 2 MiB aligned
#               | what is beyond 32 GiB        |
#               +------------------------------+ RAM_BASE + the RAM's size
#
# With the private backing all of this lies in RAM's first PRIVATE_BOOT bytes. The rest is free.
#
# Half-open ranges, one per row (see MAP below). Rows that depend on the number of vCPUs show the reserved size.
#
#   name             start        end          size
#   GIC distributor  0x0800_0000  0x0801_0000  0x1_0000   in the kernel
#   GICv2 CPU        0x0801_0000  0x0801_2000  0x2000     in the kernel, where there is no GICv3
#   GICv3 ITS        0x0808_0000  0x080a_0000  0x2_0000   in the kernel
#   GICv3 redist     0x080a_0000  0x0900_0000  0xf6_0000  in the kernel; 0x2_0000 a vCPU
#   PL011            0x0900_0000  0x0900_1000  0x1000     SPI 1
#   PL031            0x0901_0000  0x0901_1000  0x1000
#   share doorbell   0x0910_0000  0x0910_1000  0x1000
#   echo             0x0911_0000  0x0911_1000  0x1000
#   mailbox          0x0920_0000  0x0930_0000  0x10_0000  0x1000 a vCPU
#   bench            0x0930_0000  0x0930_4000  0x4000
#   virtio-mmio      0x0a00_0000  0x0a10_0000  0x10_0000  0x200 a device; SPIs 32 and up
#   other devices    0x0b00_0000  0x0c00_0000  0x100_0000 each at a multiple of 0x1_0000; SPIs 2 to 31
#   RAM              0x8000_0000  (as asked)


class Window(NamedTuple):
    """A named, half-open range of guest addresses. ``spi`` is its (first) reserved shared interrupt."""

    name: str
    start: int
    end: int
    spi: int | None = None

    @property
    def size(self) -> int:
        """Bytes from start to end."""
        return self.end - self.start


#: Shared peripheral interrupts that the controller has: SPI 0 to SPIS - 1. With a vCPU's 32 private ones this is KVM's
#: default (VGIC_NR_IRQS_LEGACY).
SPIS: Final = 224
PL011_SPI: Final = 1
#: SPI of the first device that is neither the machine's own nor virtio. The next ones follow, up to VIRTIO_SPI.
OTHER_SPI: Final = 2
#: SPI of the first virtio device. The next ones follow.
VIRTIO_SPI: Final = 32

GIC_DISTRIBUTOR: Final = Window("GIC distributor", 0x0800_0000, 0x0801_0000)
GIC_CPU: Final = Window("GICv2 CPU", 0x0801_0000, 0x0801_2000)
GIC_ITS: Final = Window("GICv3 ITS", 0x0808_0000, 0x080A_0000)
GIC_REDISTRIBUTORS: Final = Window("GICv3 redist", 0x080A_0000, 0x0900_0000)
PL011: Final = Window("PL011", 0x0900_0000, 0x0900_1000, PL011_SPI)
PL031: Final = Window("PL031", 0x0901_0000, 0x0901_1000)
SHARE_DOORBELL: Final = Window("share doorbell", 0x0910_0000, 0x0910_1000)
ECHO: Final = Window("echo", 0x0911_0000, 0x0911_1000)
MAILBOX: Final = Window("mailbox", 0x0920_0000, 0x0930_0000)
BENCH: Final = Window("bench", 0x0930_0000, 0x0930_4000)
VIRTIO_MMIO: Final = Window("virtio-mmio", 0x0A00_0000, 0x0A10_0000, VIRTIO_SPI)
OTHER_DEVICES: Final = Window("other devices", 0x0B00_0000, 0x0C00_0000, OTHER_SPI)

#: Every window below RAM, by address.
MAP: Final = (
    GIC_DISTRIBUTOR,
    GIC_CPU,
    GIC_ITS,
    GIC_REDISTRIBUTORS,
    PL011,
    PL031,
    SHARE_DOORBELL,
    ECHO,
    MAILBOX,
    BENCH,
    VIRTIO_MMIO,
    OTHER_DEVICES,
)

RAM_BASE: Final = 0x8000_0000
#: RAM ends at 2^40 or below: a protected VM's guest addresses have at most 40 bits (its PARange, set in
#: arch/arm64/kvm/hyp/nvhe/sys_regs.c).
RAM_LIMIT: Final = 1 << 40
#: The built-in payloads map only addresses below this (firmware/start.S), so their device tree must lie below it.
PAYLOAD_LIMIT: Final = 1 << 39
#: Room for a flat binary at FLAT_OFFSET and a device tree's 2 MiB.
RAM_MINIMUM: Final = 4 * MIB

#: With the private backing, the host cannot access guest pages. So this many bytes at RAM's start are a memfd instead,
#: and everything is loaded there.
PRIVATE_BOOT: Final = 8 * MIB

#: Offset of a flat binary in RAM, as in QEMU.
FLAT_OFFSET: Final = 0x8_0000

#: A vCPU finds its mailbox by MPIDR.Aff0, which KVM gives 16 values (reset_mpidr in arch/arm64/kvm/sys_regs.c).
MAX_VCPUS: Final = 16
#: A GICv2 names vCPUs by a byte with a bit for each (VGIC_V2_MAX_CPUS).
MAX_VCPUS_GICV2: Final = 8


def mpidr(index: int) -> int:
    """Return the affinity fields KVM gives a vCPU: 16 in a cluster (Aff0), clusters in Aff1 and Aff2."""
    return (index & 0xF) | (index >> 4 & 0xFF) << 8 | (index >> 12 & 0xFF) << 16
