# SPDX-License-Identifier: Apache-2.0
"""The clock: a PL031, whose seconds are the host's wall clock plus what the guest has set.

It has no interrupt line, so Linux offers no alarm. A guest can still poll the alarm. A restored guest reads the
host's time of now, not that of the snapshot.
"""

from __future__ import annotations

import threading
import time

from pyvmm.devices.base import Device
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final


class At:
    """Offsets of registers: Arm DDI 0224, 3.2."""

    DR: Final = 0x00
    MR: Final = 0x04
    LR: Final = 0x08
    CR: Final = 0x0C
    IMSC: Final = 0x10
    RIS: Final = 0x14
    MIS: Final = 0x18
    ICR: Final = 0x1C
    IDS: Final = 0xFE0


_IDS: Final = (0x31, 0x10, 0x04, 0x00, 0x0D, 0xF0, 0x05, 0xB1)
_WRAP: Final = 1 << 32
_SAVED: Final = ("offset", "match", "load", "mask", "since")


class Pl031(Device):
    """Arm PrimeCell real time clock, DDI 0224. Its counter has 32 bits: it wraps in the year 2106, as the part does."""

    name = "pl031"
    # Linux Documentation/devicetree/bindings/rtc/arm,pl031.yaml
    node = "rtc"
    compatible = ("arm,pl031", "arm,primecell")
    clocks = ("apb_pclk",)

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        # Seconds that the guest set it ahead of the host, modulo _WRAP.
        self._offset = 0
        self._match = self._load = self._mask = 0
        # The alarm is raised once the counter has gone from here to the match register.
        self._since = self._next()

    def _now(self) -> int:
        return (int(time.time()) + self._offset) % _WRAP

    def _next(self) -> int:
        return (self._now() + 1) % _WRAP

    def _raised(self) -> int:
        gone = (self._now() - self._since) % _WRAP
        return int((self._match - self._since) % _WRAP <= gone < _WRAP // 2)

    def read(self, offset: int, size: int, vcpu: int) -> int:  # noqa: ARG002
        """Answer a register. The control register always says that the clock runs: a guest cannot stop it."""
        with self._lock:
            match offset:
                case At.DR:
                    return self._now()
                case At.MR:
                    return self._match
                case At.LR:
                    return self._load
                case At.CR:
                    return 1
                case At.IMSC:
                    return self._mask
                case At.RIS:
                    return self._raised()
                case At.MIS:
                    return self._raised() & self._mask
        number, rest = divmod(offset - At.IDS, 4)
        return _IDS[number] if number in range(len(_IDS)) and not rest else 0

    def write(self, offset: int, size: int, value: int, vcpu: int) -> None:  # noqa: ARG002
        """Set the clock, the alarm or its mask, or clear the alarm."""
        value %= _WRAP
        with self._lock:
            match offset:
                case At.MR:
                    self._match, self._since = value, self._now()
                case At.LR:
                    self._load, self._offset = value, (value - int(time.time())) % _WRAP
                    self._since = value
                case At.IMSC:
                    self._mask = value & 1
                case At.ICR if value & 1:
                    self._since = self._next()

    def save(self) -> dict[str, Any]:
        """Return how far ahead of the host the guest set it, and the alarm."""
        return {name: getattr(self, f"_{name}") for name in _SAVED}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore both. The time goes on from the host's. Raises UsageError for a value of more than 32 bits."""
        from pyvmm.schema import NUMBER, check

        check(saved, dict.fromkeys(_SAVED, NUMBER), self.name)
        for name in _SAVED:
            if (value := saved[name]) >= _WRAP:
                raise UsageError(f"the saved clock's {name} is {value:#x}, which has more than 32 bits")
            setattr(self, f"_{name}", value)
