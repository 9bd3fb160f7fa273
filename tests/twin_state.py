# SPDX-License-Identifier: Apache-2.0
"""The twin's state of a VM: memory, ranges and the devices in them. Owned by tests.twin."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pyvmm._native import lib


class Kernel(Protocol):
    """The calls of the loop to KVM and to the host."""

    def enter(self) -> int: ...  # KVM_RUN: 0 or an errno
    def get_x(self, n: int) -> int: ...
    def set_x(self, n: int, value: int) -> None: ...
    def signal(self, fd: int) -> None: ...
    def irq_line(self, irq: int, level: bool) -> None: ...
    def protect(self, gpa: int, open_: bool) -> bool: ...
    def drop(self, gpa: int, conversion: int) -> bool: ...
    def probe(self, gpa: int) -> bool: ...


@dataclass
class Region:
    gpa: int
    size: int
    ledger: bytearray


@dataclass
class Range:
    base: int
    size: int
    kind: int
    state: Any = None
    reads: int = 0
    writes: int = 0


@dataclass
class Counter:
    value: int = 0


@dataclass
class Doorbell:
    slots: list[tuple[int, int | None, int]]  # offset, value (None: any), fd
    missed: int = 0


@dataclass
class Mailbox:
    state: int = lib.PV_MAILBOX_IDLE
    trapped: int = 0
    order: list[int] = field(default_factory=lambda: [0] * 8)
    result: list[int] = field(default_factory=lambda: [0] * 8)
    trap: list[int] = field(default_factory=lambda: [0] * 8)
    note: list[int] = field(default_factory=lambda: [0] * 4)


@dataclass
class Pl011:
    tx_size: int
    rx_size: int
    irq: int = -1
    tx: deque[int] = field(default_factory=deque)
    rx: deque[int] = field(default_factory=deque)
    registers: dict[int, int] = field(default_factory=dict)
    ris: int = 0
    level: bool = False

    MASKS: ClassVar = {0x20: 0xFF, 0x24: 0xFFFF, 0x28: 0x3F, 0x2C: 0xFF, 0x30: 0xFFFF, 0x34: 0x3F, 0x38: 0x7FF, 0x48: 7}
    IDS = (0x11, 0x10, 0x14, 0x00, 0x0D, 0xF0, 0x05, 0xB1)

    def update(self, kernel: Kernel) -> None:
        self.ris = self.ris | 0x10 if self.rx else self.ris & ~0x10
        level = bool(self.ris & self.registers.get(0x38, 0))
        if level != self.level and self.irq >= 0:
            kernel.irq_line(self.irq, level)
        self.level = level

    def load(self, offset: int) -> int:
        match offset:
            case 0x00:
                return self.rx.popleft() if self.rx else 0
            case 0x18:
                depth = 16 if self.registers.get(0x2C, 0) & 0x10 else 1
                return 0x80 | (0 if self.rx else 0x10) | (0x40 if len(self.rx) >= depth else 0)
            case 0x3C:
                return self.ris
            case 0x40:
                return self.ris & self.registers.get(0x38, 0)
        if 0xFE0 <= offset < 0x1000:
            return self.IDS[(offset - 0xFE0) // 4]
        return self.registers.get(offset, 0)

    def store(self, offset: int, value: int) -> bool:
        if offset == 0x00:
            if len(self.tx) >= self.tx_size:
                return False
            self.tx.append(value & 0xFF)
            self.ris |= 0x20
        elif offset == 0x44:
            self.ris &= ~value
        elif offset in self.MASKS:
            self.registers[offset] = value & self.MASKS[offset]
        return True


@dataclass
class Virtio:
    """A virtio-mmio transport: ``queues`` are (maximum size, ready), ``registers`` those that no selector changes."""

    bell: Doorbell
    offered: list[int]
    queues: list[tuple[int, int]]
    registers: dict[int, int]
    config: bytes
    interrupts: int = 0
    selected: dict[int, int] = field(default_factory=lambda: {0x14: 0, 0x24: 0, 0x30: 0})

    def load(self, offset: int) -> int:
        word, queue = self.selected[0x14], self.selected[0x30]
        match offset:
            case 0x10:
                return self.offered[word] if word < len(self.offered) else 0
            case 0x34 | 0x44:
                return self.queues[queue][offset == 0x44] if queue < len(self.queues) else 0
            case 0x60:
                return self.interrupts
        return self.registers.get(offset, 0)

    def store(self, offset: int, value: int) -> bool:
        if offset in self.selected:
            self.selected[offset] = value
        elif offset == 0x64:
            self.interrupts &= ~value
        else:
            return False
        return True


@dataclass
class Vm:
    protection: int
    regions: list[Region] = field(default_factory=list)
    ranges: list[Range] = field(default_factory=list)
    subscribers: bool = False
    conversion: int = lib.PV_CONVERT_PRESERVE
    policy: dict[int, int] = field(default_factory=dict)
    retry_limit: int = 0
    shares: int = 0
    unshares: int = 0
    refused: int = 0

    def region(self, gpa: int) -> Region | None:
        return next((r for r in self.regions if r.gpa <= gpa < r.gpa + r.size), None)

    def pages(self) -> list[int]:
        entries = [entry & 7 for region in self.regions for entry in region.ledger]
        return [entries.count(state) for state in range(8)]
