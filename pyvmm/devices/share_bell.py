# SPDX-License-Identifier: Apache-2.0
"""The share doorbell: a register by which a guest reports its shares, which pKVM's host kernel does not report.

The native loop does all of it. It checks the address, and for a protected guest also that the page is readable. It then
updates the ledger and stops for the relay. Registers in firmware/lib/abi.h.
"""

from __future__ import annotations

from pyvmm._native import lib
from pyvmm.devices.base import Device
from pyvmm.pages import HOST_PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ShareBell(Device):
    """A window that C serves. It owns nothing."""

    name = "share-doorbell"
    compatible = "pyvmm,share-doorbell"
    kind = lib.PV_KIND_SHARE

    def properties(self) -> dict[str, Any]:
        """Tell payloads the size of the pages that they can share. Under pkvm the hypervisor tells it, too."""
        return {"pyvmm,page-size": HOST_PAGE}

    def save(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}
