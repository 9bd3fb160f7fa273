# SPDX-License-Identifier: Apache-2.0
"""The registers of virtio over MMIO, version 2 (virtio 1.2, 4.2.2), and checks of writes to them.

Data and pure functions; :mod:`pyvmm.devices.virtio.mmio` acts on them.
"""

from __future__ import annotations

from enum import IntFlag

from pyvmm.errors import hex_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#: Bytes of a transport.
SIZE: Final = 0x200
MAGIC: Final = int.from_bytes(b"virt", "little")
VERSION: Final = 2
VENDOR: Final = int.from_bytes(b"pyvm", "little")
#: Where the configuration space begins.
CONFIG: Final = 0x100
#: A register's bits.
LOW: Final = 0xFFFF_FFFF
_MOST_ENTRIES: Final = 1 << 15


class Register:
    """Offsets (4.2.2). Plain numbers: creating an enum of this size takes longer than a guest's device discovery."""

    MAGIC: Final = 0x000
    VERSION: Final = 0x004
    DEVICE_ID: Final = 0x008
    VENDOR_ID: Final = 0x00C
    DEVICE_FEATURES: Final = 0x010
    DEVICE_FEATURES_SEL: Final = 0x014
    DRIVER_FEATURES: Final = 0x020
    DRIVER_FEATURES_SEL: Final = 0x024
    QUEUE_SEL: Final = 0x030
    QUEUE_SIZE_MAX: Final = 0x034
    QUEUE_SIZE: Final = 0x038
    QUEUE_READY: Final = 0x044
    QUEUE_NOTIFY: Final = 0x050
    INTERRUPT_STATUS: Final = 0x060
    INTERRUPT_ACK: Final = 0x064
    STATUS: Final = 0x070
    QUEUE_DESC_LOW: Final = 0x080
    QUEUE_DESC_HIGH: Final = 0x084
    QUEUE_DRIVER_LOW: Final = 0x090
    QUEUE_DRIVER_HIGH: Final = 0x094
    QUEUE_DEVICE_LOW: Final = 0x0A0
    QUEUE_DEVICE_HIGH: Final = 0x0A4
    SHM_LEN_LOW: Final = 0x0B0
    SHM_LEN_HIGH: Final = 0x0B4
    SHM_BASE_LOW: Final = 0x0B8
    SHM_BASE_HIGH: Final = 0x0BC
    CONFIG_GENERATION: Final = 0x0FC


class Status(IntFlag):
    """Device status (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


#: Bits that a driver sets, and their required bits. The device grants FEATURES_OK.
BEFORE: Final = {
    Status.ACKNOWLEDGE: Status(0),
    Status.DRIVER: Status.ACKNOWLEDGE,
    Status.FEATURES_OK: Status.ACKNOWLEDGE | Status.DRIVER,
    Status.DRIVER_OK: Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK,
    Status.FAILED: Status(0),
}


class Setup:
    """The driver's setup of a queue: entries, and the gpas of its areas."""

    __slots__ = ("descriptors", "device", "driver", "size")

    def __init__(self, size: int = 0, descriptors: int = 0, driver: int = 0, device: int = 0) -> None:
        self.size, self.descriptors, self.driver, self.device = size, descriptors, driver, device

    def save(self) -> dict[str, int]:
        """Return it as constructor arguments."""
        return {name: getattr(self, name) for name in self.__slots__}


#: Registers that hold half of an area's gpa: which, and from which bit.
AREAS: Final = {
    Register.QUEUE_DESC_LOW: ("descriptors", 0), Register.QUEUE_DESC_HIGH: ("descriptors", 32),
    Register.QUEUE_DRIVER_LOW: ("driver", 0), Register.QUEUE_DRIVER_HIGH: ("driver", 32),
    Register.QUEUE_DEVICE_LOW: ("device", 0), Register.QUEUE_DEVICE_HIGH: ("device", 32),
}  # fmt: skip


def objection(setup: Setup, most: int, *, packed: bool) -> str | None:
    """Return why the driver's setup of a queue is invalid, or None."""
    size = setup.size
    if not 1 <= size <= min(most, _MOST_ENTRIES) or (not packed and size & (size - 1)):
        kind = "1" if packed else "a power of two"
        return f"{size} entries: {kind} to {most} are possible"
    # 2.7 and 2.8.10.1: alignment and bytes.
    areas = {
        "descriptors": (16, 16 * size),
        "driver": (4, 4) if packed else (2, 6 + 2 * size),
        "device": (4, 4) if packed else (4, 6 + 8 * size),
    }
    for area, (alignment, length) in areas.items():
        gpa = getattr(setup, area)
        if gpa % alignment or gpa + length > 1 << 64:
            return f"the {area} area at gpa {hex_(gpa)}: it has {length} bytes, at a multiple of {alignment}"
    return None
