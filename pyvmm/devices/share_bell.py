# SPDX-License-Identifier: Apache-2.0
"""The share doorbell: one register by which a guest says what it shares, since pKVM's kernel tells nobody.

The native loop does all of it: checks the address, believes a protected guest only if the page can really be read,
enters the ledger and stops for the relay. Registers in firmware/lib/abi.h.
"""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.devices.base import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ShareBell(Device):
    """A window that C serves; there is nothing to own."""

    name = "share-doorbell"
    compatible = "pyvmm,share-doorbell"
    kind = lib.PV_KIND_SHARE

    def save(self) -> dict[str, Any]:
        """There is nothing to it."""
        return {}
