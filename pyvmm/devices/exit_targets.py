# SPDX-License-Identifier: Apache-2.0
"""A bench device with every kind of the native loop, to measure exits: registers, counter, doorbell, cold."""

from __future__ import annotations

import os

from pyvmm import abi
from pyvmm._native import ffi, lib
from pyvmm.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm._native import CData

PART = 0x1000


class ExitTargets(Device):
    """Four pages of MMIO, one per kind. A store to the doorbell page writes an eventfd."""

    name = "bench"
    compatible = "pyvmm,bench"

    def __init__(self) -> None:
        super().__init__(size=4 * PART)
        self._registers = ffi.new("uint8_t[]", PART)
        self._counter = ffi.new("uint64_t *")
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._slots = ffi.new("struct pv_doorbell_slot[1]")
        self._slots[0].fd, self._slots[0].match_any = self.eventfd, 1
        self._bell = ffi.new("struct pv_doorbell *", {"count": 1, "slots": self._slots})
        self.cold = 0

    def windows(self) -> list[tuple[int, int, int | None, CData | None]]:
        """One window a kind."""
        return [
            (abi.BENCH_REGISTERS, PART, lib.PV_KIND_REGISTERS, self._registers),
            (abi.BENCH_COUNTER, PART, lib.PV_KIND_COUNTER, self._counter),
            (abi.BENCH_DOORBELL, PART, lib.PV_KIND_DOORBELL, self._bell),
            (abi.BENCH_COLD, PART, None, None),
        ]

    @property
    def registers(self) -> bytes:
        """The contents of the register file."""
        return bytes(ffi.buffer(self._registers))

    def read(self, offset: int, size: int, vcpu: int) -> int:  # noqa: ARG002
        """Answer from Python, with the last value stored."""
        return self.cold

    def write(self, offset: int, size: int, value: int, vcpu: int) -> None:  # noqa: ARG002
        """Take a value in Python."""
        self.cold = value

    def save(self) -> dict[str, Any]:
        """Return registers, counter and the last store."""
        return {"registers": self.registers.hex(), "counter": int(self._counter[0]), "cold": self.cold}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore them."""
        from pyvmm.schema import BYTES, U64, check

        check(saved, {"registers": BYTES, "counter": U64, "cold": U64}, self.name)
        ffi.buffer(self._registers)[:] = bytes.fromhex(saved["registers"])
        self._counter[0], self.cold = saved["counter"], saved["cold"]

    def close(self) -> None:
        """Close the doorbell's eventfd."""
        if self.eventfd >= 0:
            os.close(self.eventfd)
            self.eventfd = -1
