# SPDX-License-Identifier: Apache-2.0
"""A device in one file: a dice. A load from its only register throws it.

From Python: ``Machine(config, devices=[DiceDevice()])``. From the command line: ``pyvmm run --device dice,sides=20``,
if a package brings it with this entry point::

    [project.entry-points."pyvmm.devices"]
    dice = "pyvmm.examples.dice:KIND"
"""

from __future__ import annotations

import os
from typing import Any

from pyvmm.devices.base import Device
from pyvmm.devices.kind import Context, DeviceKind, DeviceSpec
from pyvmm.errors import UsageError
from pyvmm.syntax.option import Option
from pyvmm.syntax.parts import Parts
from pyvmm.syntax.values import parse_count


class Dice(DeviceSpec):
    """What a dice is to be: ``sides`` are 1 to 256."""

    virtio = False

    def __init__(self, sides: int = 6) -> None:
        if not 1 <= sides <= 256:
            raise UsageError(f"a dice with {sides} sides: it can have 1 to 256")
        self.sides = sides

    def make(self, context: Context) -> DiceDevice:  # noqa: ARG002 - it needs nothing of its machine
        """Make it."""
        return DiceDevice(self.sides)


class DiceDevice(Device):
    """One page of MMIO: a load at offset 0 gives 1 to ``sides``, everything else reads as zero."""

    name = "dice"
    compatible = "pyvmm,dice"

    def __init__(self, sides: int = 6) -> None:
        super().__init__()
        self.sides = sides

    def read(self, offset: int, size: int, vcpu: int) -> int:  # noqa: ARG002 - any width, any vCPU
        """Throw it. Bytes that would make some sides likelier than others are thrown again."""
        while (byte := os.getrandom(1)[0]) >= 256 - 256 % self.sides:
            pass
        return 1 + byte % self.sides if offset == 0 else 0

    def properties(self) -> dict[str, Any]:
        """Tell the guest's driver how many sides there are."""
        return {"pyvmm,sides": self.sides}

    def save(self) -> dict[str, Any]:
        """Return nothing: a dice has no memory."""
        return {}


KIND = DeviceKind(
    Option("dice", metavar="[,sides=N]", type=Parts({"sides": parse_count}), help="a dice, thrown by a load"),
    lambda parts, _around: Dice(**parts),
)
