# SPDX-License-Identifier: Apache-2.0
"""A generation id: 16 random bytes in guest memory that a restore replaces, so that two clones do not share keys.

Linux mixes them into its random numbers, at boot and when the interrupt says that there are new ones. They lie in a
slot of their own, outside of the memory node: the driver maps them as a device's, and reads them with instructions
that KVM cannot decode for an access without a slot.
"""

from __future__ import annotations

import os

from pyvmm.devices.base import Device, Trigger
from pyvmm.memory.address import Gpa
from pyvmm.memory.backing import Memfd
from pyvmm.pages import HOST_PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    from pyvmm.memory.memory import Memory

SIZE: Final = 16


class VmGenId(Device):
    """A page of ``memory`` that begins with the id. The guest's accesses to it never exit."""

    # Linux Documentation/devicetree/bindings/rng/microsoft,vmgenid.yaml
    name = "vmgenid"
    compatible = "microsoft,vmgenid"
    trigger = Trigger.EDGE

    def __init__(self, memory: Memory) -> None:
        super().__init__(size=HOST_PAGE)
        self._memory = memory
        self._base: int | None = None

    def placed_at(self, base: int) -> None:
        """Add the slot, with a new id."""
        self._base = base
        self._memory.add(base, Memfd(HOST_PAGE))
        self._renew()

    def _renew(self) -> None:
        assert self._base is not None
        self._memory.write(Gpa(self._base), os.urandom(SIZE))

    def save(self) -> dict[str, Any]:
        """Return nothing: the id is in guest memory, and no restored guest has it."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:  # noqa: ARG002
        """Give the restored guest a new id, and tell the guest."""
        self._renew()
        self.line.trigger()
